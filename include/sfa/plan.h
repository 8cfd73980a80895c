/* sfa/plan.h: what the planner knows and what it chose. The command `sfa plan` is a thin layer over this.
 *
 * The choice is a pure function of the options, the instruction set and a table of costs. The table in the source belongs to the
 * instruction set; sfa_costs_measure times this machine in under two seconds, and the caller may keep the result. docs/PLANNER.md.
 */
#ifndef SFA_PLAN_H
#define SFA_PLAN_H

#include <sfa/attention.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  SFA_COST_DIMS = 3,  /* entries for a head dim of 64, 128 and 256; others lie between, or at the ends */
  SFA_COST_KEPT = 3,  /* entries for k = 8, 16 and 32; beyond 32 a line through the last two */
  SFA_COST_TYPES = 7, /* entries by sfa_dtype; the first is not used */
  SFA_COST_ROWS = 2   /* entries for one query row, and for each further one that shares what was read */
};

/* Times of one thread in nanoseconds, each for one unit of work. Every entry but near_bytes is a time; all must be positive,
 * but for the half entries, which may be 0 where the instruction set has no 16-bit arithmetic. */
struct sfa_costs {
  size_t struct_size; /* sizeof(sfa_costs) */
  sfa_isa isa;        /* whose kernels these are */

  double call;       /* a call, before any work */
  double block;      /* a query block: finding, clearing, writing out */
  double tile;       /* a tile of 64 keys that a block meets: the calls of its steps */
  double near_bytes; /* bytes of keys and values that stay in the cache from one call to the next */
  double read_byte;  /* a byte beyond them, read in order */

  /* Rows to codes, and to what is stored. */
  double topk[SFA_COST_DIMS][SFA_COST_KEPT];      /* a row of head dim D, K features kept */
  double topk_bf16[SFA_COST_DIMS][SFA_COST_KEPT]; /* the same of rows that are bf16 */
  double pack_value[SFA_COST_TYPES];              /* a value rounded to a type */
  double load_value[SFA_COST_TYPES];              /* a value of a type read back as f32 */

  /* SFA_POLICY_TILES: lanes are query rows. A pair is one lane and one key. */
  double query_value;                /* a value of a query row laid into its block */
  double code_pair[SFA_COST_DIMS];   /* a pair scored from a code: what does not grow with K, by D */
  double code_step[SFA_COST_DIMS];   /* a kept feature of such a pair, by D */
  double dense_step[SFA_COST_DIMS];  /* a feature of a pair scored from dense rows, by D */
  double densify_key, densify_value; /* a key's code written out as a dense row: a feature of the row, a kept feature */
  double exp_pair;                   /* softmax of a pair */
  double value_step[SFA_COST_DIMS];  /* a value of a V row added to a query row, by E */

  /* SFA_POLICY_KEYS: lanes are keys. */
  double keys_table;                                /* a feature of a query row laid into its table */
  double keys_code[SFA_COST_TYPES][SFA_COST_ROWS];  /* a kept feature of a key, by type */
  double keys_dense[SFA_COST_TYPES][SFA_COST_ROWS]; /* a feature of a dense key, by type */
  double keys_exp_pair;                             /* softmax of one key and one query row */
  double keys_value[SFA_COST_TYPES][SFA_COST_ROWS]; /* a value of a V row, by type */

  /* SFA_POLICY_HALF_CODES and HALF_DENSE: 16-bit arithmetic. Only instruction sets with it have these entries; the others hold 0. */
  double half_code_step[SFA_COST_DIMS];  /* a kept feature of a pair, by D */
  double half_dense_step[SFA_COST_DIMS]; /* a feature of a pair, by D */
  double half_exp_pair;                  /* softmax of a pair; the maximum and the sum included */
  double half_value_step[SFA_COST_DIMS]; /* a value of a V row added to a query row, by E */
  double half_pack_value;                /* a value of a key or of a V row brought into the form that the products want */

  /* SFA_POLICY_PAPER and POSTINGS. */
  double paper_entry;   /* an entry of a posting list scattered into the scores */
  double posting_entry; /* a key of a sealed block that a list adds to; from AVX-512 on 64 of them at once */
};

/* The table in the source for an instruction set; SFA_ISA_DEFAULT: the best one here. */
SFA_API void sfa_costs_default(sfa_isa isa, sfa_costs *costs);
/* Times this machine's kernels under the context's instruction set, one thread, in under two seconds. As in sfa_costs_default stay
 * those of policies that the instruction set lacks, and what is about calls, blocks, tiles, cache sizes, Algorithm 1 and posting lists. On
 * failure *costs is unchanged. */
SFA_API sfa_status sfa_costs_measure(sfa_context *ctx, sfa_costs *costs);

typedef struct sfa_attention_report {
  size_t struct_size;                                      /* sizeof(sfa_attention_report) */
  sfa_policy policy;                                       /* chosen */
  int32_t densified;                                       /* 1: TILES writes codes out as dense rows, which is cheaper here; same bits */
  const char *reason;                                      /* one line */
  double topk_ns, pack_ns, score_ns, softmax_ns, value_ns; /* predicted, one thread, whole call */
  double call_ns;                                          /* the rest of it: calls, blocks, tiles */
  double dense_ns;                                         /* the same call with k = 0: all of its stages */
  int64_t key_bytes, value_bytes, dense_key_bytes;         /* that the call's keys and values take */
  int64_t workspace_bytes;
  int32_t dense_wins; /* 1: with these options dense would be faster here */
} sfa_attention_report;

/* What the plan will do and what it should cost. report.struct_size must be set. Lengths are taken as the plan's largest. On a CUDA
 * context no times are predicted: they are 0. */
SFA_API sfa_status sfa_attention_plan_report(const sfa_attention_plan *plan, sfa_attention_report *report);
/* "auto", "tiles", "keys", "half-codes", "half-dense", "paper", "postings", "bf16", "sp-bf16", "int8", "sp-int8"; "unknown" for other
 * numbers. */
SFA_API const char *sfa_policy_name(sfa_policy policy);

#ifdef __cplusplus
}
#endif
#endif
