/* The input is a document index. */
#include "fuzz_case.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "file/index_file.h"

static uint64_t word_at(const uint8_t *data, uint64_t at) {
  uint64_t word;
  memcpy(&word, data + at, sizeof word);
  return word;
}

/* The last 8 of n bytes become the checksum of the others. */
static void seal(uint8_t *data, size_t n) {
  uint64_t sum = sfa_hash_bytes(0, data, n - 8);
  memcpy(data + n - 8, &sum, 8);
}

static void repair(uint8_t *data, size_t bytes) {
  if (bytes < SFA_INDEX_SETTINGS_AT)
    return;
  sfa_index_header header;
  memcpy(&header, data, sizeof header);
  if (header.settings_bytes <= bytes - SFA_INDEX_SETTINGS_AT) {
    header.settings_checksum = sfa_hash_bytes(0, data + SFA_INDEX_SETTINGS_AT, header.settings_bytes);
    memcpy(data, &header, sizeof header);
  }
  seal(data, sizeof header);
  for (int i = 0; i < 2; i++) {
    uint8_t *slot = data + (i + 1) * SFA_INDEX_SLOT_BYTES;
    seal(slot, sizeof(sfa_index_slot));
    uint64_t at = word_at(slot, offsetof(sfa_index_slot, segment));
    for (int n = 0; n < 64 && at <= bytes && sizeof(sfa_index_segment) <= bytes - at; n++) {
      sfa_index_segment *head = malloc(sizeof *head);
      fuzz_check(head != NULL, "memory for a segment's head");
      memcpy(head, data + at, sizeof *head);
      uint64_t meta_at = at + sizeof *head;
      if (head->pages_at >= meta_at && head->pages_at <= bytes) {
        head->meta_checksum = sfa_hash_bytes(0, data + meta_at, head->pages_at - meta_at);
        memcpy(data + at, head, sizeof *head);
      }
      seal(data + at, sizeof *head);
      at = head->previous;
      free(head);
      if (at == 0)
        break;
    }
  }
}

static volatile uint64_t seen; /* keeps the reads of walk */

static void walk(const sfa_index *index) {
  sfa_index_info info;
  sfa_index_source source;
  sfa_index_describe(index, &info);
  uint64_t sum = sfa_hash_bytes(0, info.model_name, strlen(info.model_name));
  for (int64_t i = 0; i < info.n_tokens; i++)
    fuzz_check(sfa_index_tokens(index)[i] >= 0 && sfa_index_tokens(index)[i] < info.vocab_size, "a token is of the vocabulary");
  for (int64_t i = 0, end = 0; sfa_index_source_at(index, i, &source); i++) {
    fuzz_check(source.first_token >= end && source.n_tokens >= 0, "sources are in order");
    end = source.first_token + source.n_tokens;
    fuzz_check(end <= info.n_tokens, "a source is inside the text");
    sum = sfa_hash_bytes(sum, source.name, strlen(source.name));
  }
  for (int64_t p = 0; p < index->n_pages * index->settings.n_layers; p++) {
    const uint8_t *page = index->pages[p];
    uint64_t page_bytes = index->layers[p / index->n_pages].page_bytes;
    fuzz_check(page >= index->map.data && page_bytes <= (uint64_t)(index->map.data + index->map.bytes - page), "a page is inside the file");
    sum ^= word_at(page, 0) ^ word_at(page, page_bytes - 8);
  }
  sfa_status status = sfa_index_verify(index);
  fuzz_check(status == SFA_OK || status == SFA_ERROR_FORMAT, "verifying says good or damaged");
  seen = sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  fuzz_write_repaired("index", data, bytes, repair);
  sfa_index *index;
  const sfa_status status = sfa_index_open(fuzz_context(), fuzz_path("index"), &index);
  fuzz_check_open(status, "index", index);
  if (index)
    walk(index);
  sfa_index_close(index);
  return 0;
}
