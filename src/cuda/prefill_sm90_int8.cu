/* cuda/prefill_sm90_int8.cu: the instances of prefill_sm90.cuh of policy INT8. */
#include "cuda/prefill_sm90.cuh"

const char *sfa_prefill_int8(const sfa_cuda_prefill *args, sfa_cuda_stream stream) {
  return sfa_prefill_fit<SFA_POLICY_INT8>(args, stream);
}
