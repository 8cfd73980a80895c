/* Checkpoints as files; the layout is in docs/LAYOUTS.md. */
#include "train/checkpoint.h"

#include <sfa/stream.h>

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "file/save.h"

typedef struct header {
  char magic[8];
  uint32_t version, endian;
  uint64_t file_bytes;
  int64_t step, n_tokens;
  double loss_sum;
  int64_t loss_steps;
  uint64_t recipe_bytes, n_parameters;
  uint64_t reserved[6];
  uint64_t checksum; /* of the 120 bytes before it */
} header;
_Static_assert(sizeof(header) == 128, "the layout has no gaps");

/* Before the name, which has zeros up to a multiple of 8 behind it. */
typedef struct entry {
  uint64_t n, name_bytes, n_arrays; /* n_arrays 1: the values; 3: values and moments */
} entry;

enum { NAME_BYTES = 32, ENTRY_NAME_BYTES_MAX = 4096 };
static const char name_format[] = "step-%012" PRId64 ".sfa";

static uint64_t padded(uint64_t bytes) { return (bytes + 7) & ~(uint64_t)7; }

/* ---- Writing ---------------------------------------------------------------------------------------------------------------------- */

/* A file whose bytes behind the header are summed as they are written. */
typedef struct writer {
  sfa_context *ctx;
  sfa_save *save;
  uint64_t sum;
} writer;

/* data, then zeros up to a multiple of 8. */
static sfa_status put(writer *w, const void *data, uint64_t bytes) {
  static const uint8_t zeros[8];
  w->sum = sfa_hash_bytes(w->sum, data, (size_t)bytes);
  SFA_TRY(sfa_save_write(w->save, data, (size_t)bytes));
  return sfa_save_write(w->save, zeros, (size_t)(padded(bytes) - bytes));
}

/* data in the memory of the context's device. */
static sfa_status put_array(writer *w, const float *data, uint64_t bytes) {
  void *values;
  if (sfa_context_device(w->ctx) == SFA_DEVICE_CPU)
    return put(w, data, bytes);
  SFA_TRY(sfa_alloc(w->ctx, (size_t)bytes, "an array on its way to a file", &values));
  sfa_status status = sfa_memory_copy(w->ctx, values, data, (size_t)bytes);
  if (status == SFA_OK)
    status = sfa_stream_wait(w->ctx);
  if (status == SFA_OK)
    status = put(w, values, bytes);
  sfa_free(w->ctx, values);
  return status;
}

static entry entry_of(sfa_learner *learner, const sfa_optimizer *optimizer, int32_t index) {
  const sfa_parameter *p = sfa_learner_parameter(learner, index);
  return (entry){(uint64_t)p->n, strlen(p->name), optimizer->m[index] ? 3 : 1};
}

static sfa_status write_all(writer *w, header *head, const char *recipe, sfa_learner *learner, const sfa_optimizer *optimizer) {
  head->recipe_bytes = strlen(recipe);
  head->n_parameters = (uint64_t)sfa_learner_count(learner);
  head->file_bytes = sizeof *head + padded(head->recipe_bytes) + sizeof w->sum;
  for (int32_t i = 0; i < (int32_t)head->n_parameters; i++) {
    const entry e = entry_of(learner, optimizer, i);
    head->file_bytes += sizeof e + padded(e.name_bytes) + e.n_arrays * padded(e.n * sizeof(float));
  }
  head->checksum = sfa_hash_bytes(0, head, sizeof *head - sizeof head->checksum);
  SFA_TRY(sfa_save_write(w->save, head, sizeof *head));
  SFA_TRY(put(w, recipe, head->recipe_bytes));
  for (int32_t i = 0; i < (int32_t)head->n_parameters; i++) {
    const entry e = entry_of(learner, optimizer, i);
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    const float *arrays[] = {p->value, optimizer->m[i], optimizer->v[i]};
    SFA_TRY(put(w, &e, sizeof e));
    SFA_TRY(put(w, p->name, e.name_bytes));
    for (uint64_t a = 0; a < e.n_arrays; a++)
      SFA_TRY(put_array(w, arrays[a], e.n * sizeof(float)));
  }
  return sfa_save_write(w->save, &w->sum, sizeof w->sum);
}

static sfa_status save_text(sfa_context *ctx, const char *folder, const sfa_train_state *state, const char *recipe, sfa_learner *learner,
                            const sfa_optimizer *optimizer) {
  header head = {.magic = SFA_CHECKPOINT_MAGIC,
                 .version = SFA_CHECKPOINT_VERSION,
                 .endian = SFA_CHECKPOINT_ENDIAN,
                 .step = state->step,
                 .n_tokens = state->n_tokens,
                 .loss_sum = state->loss_sum,
                 .loss_steps = state->loss_steps};
  char name[NAME_BYTES], *path;
  snprintf(name, sizeof name, name_format, state->step);
  SFA_TRY(sfa_save_path(ctx, folder, name, &path));
  writer w = {.ctx = ctx};
  sfa_status status = sfa_save_begin(ctx, path, &w.save);
  sfa_free(ctx, path);
  if (status != SFA_OK)
    return status;
  status = write_all(&w, &head, recipe, learner, optimizer);
  if (status == SFA_OK)
    return sfa_save_commit(w.save);
  sfa_save_abandon(w.save);
  return status;
}

sfa_status sfa_checkpoint_save(sfa_context *ctx, const char *folder, const sfa_train_state *state, const cJSON *recipe,
                               sfa_learner *learner, const sfa_optimizer *optimizer) {
  char *text = sfa_json_print(recipe, false);
  if (!text)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for the text of the recipe");
  sfa_status status = save_text(ctx, folder, state, text, learner, optimizer);
  cJSON_free(text);
  return status;
}

/* ---- Reading ---------------------------------------------------------------------------------------------------------------------- */

/* A cursor over the map; sums what it passes. */
typedef struct reader {
  const sfa_checkpoint *checkpoint;
  uint64_t at, end, sum;
} reader;

static sfa_status fail_damaged(const sfa_checkpoint *c, const char *what) {
  return sfa_fail(c->ctx, SFA_ERROR_FORMAT,
                  "the checkpoint %s is damaged: %s; move it away, and the training goes on from the one before it", c->path, what);
}

/* NULL: more than is left. */
static const void *take(reader *r, uint64_t bytes) {
  const uint8_t *data = r->checkpoint->map.data + r->at;
  if (bytes > r->end - r->at || padded(bytes) > r->end - r->at)
    return NULL;
  r->sum = sfa_hash_bytes(r->sum, data, (size_t)bytes);
  r->at += padded(bytes);
  return data;
}

typedef struct saved_parameter {
  entry head;
  const char *name; /* [head.name_bytes], no terminator */
  const void *arrays[3];
} saved_parameter;

static sfa_status next_parameter(reader *r, saved_parameter *out) {
  const void *head = take(r, sizeof out->head);
  if (head)
    memcpy(&out->head, head, sizeof out->head);
  if (!head || out->head.name_bytes > ENTRY_NAME_BYTES_MAX || out->head.n > r->end / sizeof(float) ||
      (out->head.n_arrays != 1 && out->head.n_arrays != 3) || !(out->name = take(r, out->head.name_bytes)))
    return fail_damaged(r->checkpoint, "its list of parameters");
  for (uint64_t a = 0; a < out->head.n_arrays; a++)
    if (!(out->arrays[a] = take(r, out->head.n * sizeof(float))))
      return fail_damaged(r->checkpoint, "a parameter beyond its end");
  return SFA_OK;
}

static sfa_status read_header(const sfa_checkpoint *c, header *head) {
  if (c->map.bytes < sizeof *head + sizeof(uint64_t))
    return fail_damaged(c, "it is cut short");
  memcpy(head, c->map.data, sizeof *head);
  if (memcmp(head->magic, SFA_CHECKPOINT_MAGIC, sizeof head->magic) != 0 ||
      head->checksum != sfa_hash_bytes(0, head, sizeof *head - sizeof head->checksum))
    return fail_damaged(c, "its header");
  if (head->version != SFA_CHECKPOINT_VERSION || head->endian != SFA_CHECKPOINT_ENDIAN)
    return sfa_fail(c->ctx, SFA_ERROR_UNSUPPORTED, "the checkpoint %s is of version %u; this program reads version %d", c->path,
                    head->version, SFA_CHECKPOINT_VERSION);
  if (head->file_bytes != c->map.bytes)
    return fail_damaged(c, "its length");
  return SFA_OK;
}

static reader begin(const sfa_checkpoint *c) { return (reader){.checkpoint = c, .at = sizeof(header), .end = c->map.bytes - 8}; }

/* Everything up to the last checksum, so that nothing is believed before all of it is. */
static sfa_status verify(sfa_checkpoint *c) {
  header head;
  SFA_TRY(read_header(c, &head));
  reader r = begin(c);
  const char *recipe = take(&r, head.recipe_bytes);
  if (!recipe)
    return fail_damaged(c, "its recipe");
  for (uint64_t i = 0; i < head.n_parameters; i++) {
    saved_parameter p;
    SFA_TRY(next_parameter(&r, &p));
  }
  uint64_t sum;
  memcpy(&sum, c->map.data + r.end, sizeof sum);
  if (r.at != r.end || sum != r.sum)
    return fail_damaged(c, "its checksum does not fit its bytes");
  c->state = (sfa_train_state){head.step, head.n_tokens, head.loss_sum, head.loss_steps};
  return sfa_json_parse(c->ctx, c->path, recipe, (size_t)head.recipe_bytes, &c->recipe);
}

/* The step of a checkpoint's file name, or -1. */
static int64_t step_of(const char *name) {
  int64_t step;
  char again[NAME_BYTES];
  if (sscanf(name, "step-%12" SCNd64 ".sfa", &step) != 1)
    return -1;
  snprintf(again, sizeof again, name_format, step);
  return strcmp(name, again) == 0 ? step : -1;
}

/* The highest step below `below` that a checkpoint of the folder has; -1: none. */
static int64_t newest_below(const char *folder, int64_t below) {
  int64_t newest = -1;
  DIR *list = opendir(folder);
  for (struct dirent *file = list ? readdir(list) : NULL; file; file = readdir(list)) {
    int64_t step = step_of(file->d_name);
    newest = step < below && step > newest ? step : newest;
  }
  if (list)
    closedir(list);
  return newest;
}

sfa_status sfa_checkpoint_open(sfa_context *ctx, const char *folder, sfa_checkpoint *c, bool *found) {
  char name[NAME_BYTES];
  const int64_t step = newest_below(folder, INT64_MAX);
  *c = (sfa_checkpoint){.ctx = ctx};
  *found = step >= 0;
  if (!*found)
    return SFA_OK;
  snprintf(name, sizeof name, name_format, step);
  SFA_TRY(sfa_save_path(ctx, folder, name, &c->path));
  sfa_status status = sfa_map_open(ctx, c->path, &c->map);
  if (status == SFA_OK)
    status = verify(c);
  if (status != SFA_OK)
    sfa_checkpoint_close(c);
  return status;
}

void sfa_checkpoint_close(sfa_checkpoint *c) {
  if (!c->ctx)
    return;
  cJSON_Delete(c->recipe);
  sfa_map_close(&c->map);
  sfa_free(c->ctx, c->path);
  *c = (sfa_checkpoint){0};
}

sfa_status sfa_checkpoint_restore(const sfa_checkpoint *c, sfa_learner *learner, const sfa_optimizer *optimizer) {
  header head;
  memcpy(&head, c->map.data, sizeof head);
  reader r = begin(c);
  take(&r, head.recipe_bytes);
  const int32_t n = sfa_learner_count(learner);
  SFA_REQUIRE(c->ctx, head.n_parameters == (uint64_t)n, "%s has %llu parameters, the model %d: they do not belong together", c->path,
              (unsigned long long)head.n_parameters, n);
  for (int32_t i = 0; i < n; i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    const entry wanted = entry_of(learner, optimizer, i);
    saved_parameter saved;
    SFA_TRY(next_parameter(&r, &saved));
    SFA_REQUIRE(c->ctx, memcmp(&saved.head, &wanted, sizeof wanted) == 0 && memcmp(saved.name, p->name, wanted.name_bytes) == 0,
                "%s has %.*s where the model has %s, or in another size: they do not belong together", c->path, (int)saved.head.name_bytes,
                saved.name, p->name);
    float *const arrays[] = {p->value, optimizer->m[i], optimizer->v[i]};
    for (uint64_t a = 0; a < wanted.n_arrays; a++)
      SFA_TRY(sfa_memory_copy(c->ctx, arrays[a], saved.arrays[a], (size_t)wanted.n * sizeof(float)));
  }
  return SFA_OK;
}

/* ---- Old ones --------------------------------------------------------------------------------------------------------------------- */

static void delete_file(sfa_context *ctx, const char *folder, const char *name) {
  char *path;
  if (sfa_save_path(ctx, folder, name, &path) != SFA_OK)
    return;
  if (unlink(path) != 0 && errno != ENOENT)
    sfa_log(ctx, "%s stays: %s", path, strerror(errno));
  sfa_free(ctx, path);
}

void sfa_checkpoint_prune(sfa_context *ctx, const char *folder, int64_t keep) {
  int64_t oldest = INT64_MAX;
  for (int64_t i = 0; i < keep && oldest >= 0; i++)
    oldest = newest_below(folder, oldest);
  DIR *list = opendir(folder);
  for (struct dirent *file = list ? readdir(list) : NULL; file; file = readdir(list)) {
    const int64_t step = step_of(file->d_name);
    const char *ending = strrchr(file->d_name, '.');
    if ((step >= 0 && step < oldest) || (ending && strcmp(ending, ".part") == 0))
      delete_file(ctx, folder, file->d_name);
  }
  if (list)
    closedir(list);
}
