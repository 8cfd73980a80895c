/* A GGUF file, version 3 (layout: gguf.c). */
#include "file/save.h"
#include "file/weights_write.h"

#include <string.h>

enum { ALIGNMENT = 32, VERSION = 3 };

static sfa_status put_u32(sfa_save *save, uint32_t value) { return sfa_save_write(save, &value, sizeof value); }
static sfa_status put_u64(sfa_save *save, uint64_t value) { return sfa_save_write(save, &value, sizeof value); }

static sfa_status put_text(sfa_save *save, const char *text, size_t bytes) {
  SFA_TRY(put_u64(save, bytes));
  return sfa_save_write(save, text, bytes);
}

/* Bytes of a value that is no text. */
static size_t value_bytes(sfa_meta_type type) {
  switch (type) {
  case SFA_META_U8:
  case SFA_META_I8:
  case SFA_META_BOOL: return 1;
  case SFA_META_U16:
  case SFA_META_I16: return 2;
  case SFA_META_U32:
  case SFA_META_I32:
  case SFA_META_F32: return 4;
  default: return 8;
  }
}

static sfa_status put_key(sfa_save *save, const sfa_meta *key) {
  SFA_TRY(put_text(save, key->name, strlen(key->name)));
  if (key->is_array) {
    SFA_TRY(put_u32(save, SFA_META_ARRAY));
    SFA_TRY(put_u32(save, key->type));
    SFA_TRY(put_u64(save, (uint64_t)key->count));
  } else {
    SFA_TRY(put_u32(save, key->type));
  }
  if (key->type != SFA_META_STRING)
    return sfa_save_write(save, key->data, (size_t)key->count * value_bytes(key->type));
  const sfa_text *texts = key->data;
  for (int64_t i = 0; i < key->count; i++)
    SFA_TRY(put_text(save, texts[i].text, texts[i].bytes));
  return SFA_OK;
}

static uint64_t aligned(uint64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static sfa_status write_all(sfa_context *ctx, sfa_save *save, int64_t n_keys, const sfa_meta *keys, int64_t n_tensors,
                            const sfa_tensor_out *tensors) {
  SFA_TRY(sfa_save_write(save, "GGUF", 4));
  SFA_TRY(put_u32(save, VERSION));
  SFA_TRY(put_u64(save, (uint64_t)n_tensors));
  SFA_TRY(put_u64(save, (uint64_t)n_keys));
  for (int64_t i = 0; i < n_keys; i++)
    SFA_TRY(put_key(save, &keys[i]));
  uint64_t at = 0;
  for (int64_t i = 0; i < n_tensors; i++) {
    const sfa_tensor_out *t = &tensors[i];
    SFA_TRY(put_text(save, t->name, strlen(t->name)));
    SFA_TRY(put_u32(save, (uint32_t)t->n_dims));
    for (int32_t d = t->n_dims - 1; d >= 0; d--) /* innermost first */
      SFA_TRY(put_u64(save, (uint64_t)t->shape[d]));
    SFA_TRY(put_u32(save, (uint32_t)t->type));
    SFA_TRY(put_u64(save, at));
    at = aligned(at + (uint64_t)sfa_tensor_out_bytes(t));
  }
  for (int64_t i = 0; i < n_tensors; i++) {
    SFA_TRY(sfa_save_align(save, ALIGNMENT));
    SFA_TRY(sfa_tensor_append(ctx, save, &tensors[i]));
  }
  return sfa_save_align(save, ALIGNMENT);
}

sfa_status sfa_gguf_write(sfa_context *ctx, const char *path, int64_t n_keys, const sfa_meta *keys, int64_t n_tensors,
                          const sfa_tensor_out *tensors) {
  sfa_save *save;
  SFA_TRY(sfa_save_begin(ctx, path, &save));
  sfa_status status = write_all(ctx, save, n_keys, keys, n_tensors, tensors);
  if (status == SFA_OK)
    return sfa_save_commit(save);
  sfa_save_abandon(save);
  return status;
}
