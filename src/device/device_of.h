/* device/device_of.h: which machine a context computes on. */
#ifndef SFA_DEVICE_OF_H
#define SFA_DEVICE_OF_H

#include "device/training.h"

/* The operations for a context's arrays. SFA_ERROR_UNSUPPORTED, SFA_ERROR_DEVICE: it is one on a GPU, and its shared object is missing or
 * cannot start; the text says what to do. */
sfa_status sfa_device_of(sfa_context *ctx, const sfa_device **device, const sfa_training **training);

#endif
