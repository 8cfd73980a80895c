/* A safetensors file (layout: safetensors.c), and the bytes of tensors for both formats. */
#include "base/half.h"
#include "file/json.h"
#include "file/save.h"
#include "file/weights_write.h"

#include <string.h>

/* ---- Elements --------------------------------------------------------------------------------------------------------------------- */

static int64_t n_elements(const sfa_tensor_out *t) { return t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3]; }

int64_t sfa_tensor_out_bytes(const sfa_tensor_out *t) { return n_elements(t) * sfa_tensor_block_bytes(t->type); }

/* f32 [n] to the type, in place: elements only become narrower, and are taken in rising order. */
static void narrow(sfa_tensor_type type, int64_t n, float *row) {
  uint16_t *half = (uint16_t *)(void *)row;
  for (int64_t i = 0; type != SFA_TENSOR_F32 && i < n; i++) {
    float x;
    memcpy(&x, (const uint8_t *)row + (size_t)i * sizeof x, sizeof x);
    uint16_t h = type == SFA_TENSOR_BF16 ? sfa_bf16_from_f32(x) : sfa_f16_from_f32(x);
    memcpy((uint8_t *)half + (size_t)i * sizeof h, &h, sizeof h);
  }
}

sfa_status sfa_tensor_append(sfa_context *ctx, sfa_save *save, const sfa_tensor_out *t) {
  int64_t dim = t->shape[t->n_dims > 0 ? t->n_dims - 1 : 0], n_rows = n_elements(t) / dim;
  float *row;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)dim, sizeof *row, "a row of a tensor", (void **)&row));
  sfa_status status = SFA_OK;
  for (int64_t r = 0; r < n_rows && status == SFA_OK; r++) {
    if (t->row)
      t->row(t, r, row);
    else if (t->values)
      memcpy(row, t->values + r * dim, (size_t)dim * sizeof *row);
    narrow(t->type, dim, row);
    status = sfa_save_write(save, row, (size_t)(dim * sfa_tensor_block_bytes(t->type)));
  }
  sfa_free(ctx, row);
  return status;
}

/* ---- The file --------------------------------------------------------------------------------------------------------------------- */

/* The header as JSON text for cJSON_free; NULL: out of memory. */
static char *make_header(int64_t n_tensors, const sfa_tensor_out *tensors) {
  cJSON *header = cJSON_CreateObject(), *metadata = cJSON_AddObjectToObject(header, "__metadata__");
  bool complete = cJSON_AddStringToObject(metadata, "format", "pt") != NULL; /* what transformers asks for */
  int64_t at = 0;
  for (int64_t i = 0; i < n_tensors && complete; i++) {
    const sfa_tensor_out *t = &tensors[i];
    int64_t end = at + sfa_tensor_out_bytes(t);
    cJSON *entry = cJSON_AddObjectToObject(header, t->name);
    complete = cJSON_AddStringToObject(entry, "dtype", sfa_tensor_type_name(t->type)) != NULL;
    cJSON *shape = cJSON_AddArrayToObject(entry, "shape"), *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
    for (int32_t d = 0; d < t->n_dims; d++)
      complete &= cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t->shape[d])) != 0;
    complete &= cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)at)) != 0;
    complete &= cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)end)) != 0;
    at = end;
  }
  char *text = complete ? cJSON_PrintUnformatted(header) : NULL;
  cJSON_Delete(header);
  return text;
}

/* The header's length counts the spaces that bring the tensors to a multiple of 8. */
static sfa_status write_header(sfa_save *save, const char *text) {
  uint64_t bytes = strlen(text), padded = (bytes + 7) & ~(uint64_t)7;
  SFA_TRY(sfa_save_write(save, &padded, sizeof padded));
  SFA_TRY(sfa_save_write(save, text, (size_t)bytes));
  return sfa_save_write(save, "       ", (size_t)(padded - bytes));
}

sfa_status sfa_safetensors_write(sfa_context *ctx, const char *path, int64_t n_tensors, const sfa_tensor_out *tensors) {
  sfa_save *save;
  char *header = make_header(n_tensors, tensors);
  if (!header)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for the header of %s", path);
  sfa_status status = sfa_save_begin(ctx, path, &save);
  if (status == SFA_OK)
    status = write_header(save, header);
  cJSON_free(header);
  for (int64_t i = 0; i < n_tensors && status == SFA_OK; i++)
    status = sfa_tensor_append(ctx, save, &tensors[i]);
  if (status == SFA_OK)
    return sfa_save_commit(save);
  sfa_save_abandon(save);
  return status;
}
