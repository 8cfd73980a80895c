/* attn/attn_backward.h: gradients of attention on the CPU, as the API and the backend table see them. Arguments are checked. */
#ifndef SFA_ATTN_BACKWARD_H
#define SFA_ATTN_BACKWARD_H

#include "attn/attn_plan.h"

#include <sfa/backward.h>

/* 0 if they do not fit an address. */
size_t sfa_attn_backward_workspace_bytes(const sfa_attention_plan *plan);
/* args->forward is checked, strides are filled in; its workspace is not looked at. SFA_ERROR_RANGE as sfa_attn_prepare. */
sfa_status sfa_attn_backward(const sfa_attention_plan *plan, const sfa_attention_grad_args *args);

#endif
