/* cuda/prefill_sm90_bf16.cu: the instances of prefill_sm90.cuh of policy BF16. */
#include "cuda/prefill_sm90.cuh"

const char *sfa_prefill_bf16(const sfa_cuda_prefill *args, sfa_cuda_stream stream) {
  return sfa_prefill_fit<SFA_POLICY_BF16>(args, stream);
}
