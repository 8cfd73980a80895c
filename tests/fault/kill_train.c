/* kill_train KILLS FOLDER: a training is killed (SIGKILL) at uniformly drawn times, and resumed, over and over. No kill may lose or damage
 * a checkpoint, and what comes out in the end must have the bits of a training that nothing stopped. A checkpoint is written after every
 * step, so that many kills fall into such a write; a file that is still called .part tells of it. FOLDER should lie on a disk, not in
 * memory: there, putting a file on the disk takes no time. */
#include "unit_tools.h"

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include <sfa/train.h>

#include "train_files.h"

#include "train/checkpoint.h"

static char dir[TEMP_PATH_BYTES];
static int64_t n_kills = 20;

static void path_in(char out[TEMP_PATH_BYTES], const char *folder, const char *name) {
  assert_true(snprintf(out, TEMP_PATH_BYTES, "%s/%s/%s", dir, folder, name) < TEMP_PATH_BYTES);
}

/* In a process of its own, with one thread: what a child of fork may do. */
static sfa_status train(const char *out) {
  char data_path[TEMP_PATH_BYTES], out_path[TEMP_PATH_BYTES];
  path_in(data_path, ".", "data");
  path_in(out_path, out, "");
  const char *const recipes[] = {tiny_model,
                                 "{\"steps\": 30, \"checkpoint_every\": 1, \"log_every\": 1, \"sparse_attention_config\": {\"k\": 4}}"};
  const char *const data[] = {data_path};
  const sfa_train_options options = {
      .struct_size = sizeof options, .recipes = recipes, .n_recipes = 2, .data = data, .n_data = 1, .out = out_path, .resume = 1};
  sfa_context_options context = {.struct_size = sizeof context, .n_threads = 1};
  sfa_context *ctx;
  sfa_train *t;
  sfa_status status = sfa_context_create(&context, &ctx);
  if (status == SFA_OK)
    status = sfa_train_open(ctx, &options, &t);
  if (status == SFA_OK)
    status = sfa_train_run(t);
  if (status != SFA_OK)
    fprintf(stderr, "a resumed training fails: %s\n", sfa_context_error(ctx));
  return status; /* the process ends here */
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Starts a training and kills it after `seconds` (below 0: never). True: it had ended by itself, well. *took: seconds until its end. */
static bool run_and_kill(const char *out, double seconds, double *took) {
  int result;
  const double start = now();
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0)
    _exit(train(out) == SFA_OK ? 0 : 1);
  if (seconds >= 0) {
    nanosleep(&(struct timespec){(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))}, NULL);
    kill(child, SIGKILL);
  }
  assert_int_equal(waitpid(child, &result, 0), child);
  *took = now() - start;
  if (WIFEXITED(result))
    assert_int_equal(WEXITSTATUS(result), 0);
  return WIFEXITED(result);
}

static bool has_part(const char *folder) {
  bool found = false;
  DIR *list = opendir(folder);
  for (struct dirent *file = list ? readdir(list) : NULL; file; file = readdir(list))
    found |= strstr(file->d_name, ".part") != NULL;
  if (list)
    closedir(list);
  return found;
}

/* Its step, all bytes checked; -1: there is none yet. */
static int64_t newest_step(sfa_context *ctx, const char *folder) {
  sfa_checkpoint checkpoint;
  bool found;
  if (sfa_checkpoint_open(ctx, folder, &checkpoint, &found) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  const int64_t step = found ? checkpoint.state.step : -1;
  sfa_checkpoint_close(&checkpoint);
  return step;
}

static void check_result(void) {
  char whole[TEMP_PATH_BYTES], killed[TEMP_PATH_BYTES];
  path_in(whole, "whole", "model/model.safetensors");
  path_in(killed, "killed", "model/model.safetensors");
  assert_true(same_files(whole, killed));
}

static void test_kills(void **state) {
  (void)state;
  char data[TEMP_PATH_BYTES], folder[TEMP_PATH_BYTES], killed[TEMP_PATH_BYTES];
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_rng rng = {(uint64_t)time(NULL)};
  print_message("seed %llu\n", (unsigned long long)rng.state);
  path_in(data, ".", "data");
  path_in(killed, "killed", "");
  path_in(folder, "killed", "checkpoints");
  train_make_shards(ctx, data, 1, 3000);
  double whole, took;
  assert_true(run_and_kill("whole", -1, &whole));
  int64_t inside = 0, n_finished = 0, step = -1;
  for (int64_t i = 0; i < n_kills;) {
    if (run_and_kill("killed", whole * sfa_rng_uniform(&rng), &took)) {
      check_result(); /* it was faster; again from the start */
      remove_tree(killed);
      if (step < 0) /* the machine may have held the first one up */
        whole = fmin(whole, took);
      n_finished++;
      step = -1;
      continue;
    }
    i++;
    inside += has_part(folder);
    const int64_t after = newest_step(ctx, folder);
    assert_true(after >= step);
    step = after;
  }
  assert_true(run_and_kill("killed", -1, &took));
  check_result();
  print_message(
      "%lld kills, %lld of them inside the write of a checkpoint; %lld trainings of %.2f s ended meanwhile, with the bits of one that "
      "nothing stopped\n",
      (long long)n_kills, (long long)inside, (long long)n_finished + 1, whole);
  assert_true(n_kills < 1000 || inside >= 100);
  sfa_context_destroy(ctx);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_kills)};
  if (argc > 1)
    n_kills = atoll(argv[1]);
  snprintf(dir, sizeof dir, "%s/kill_train_XXXXXX", argc > 2 ? argv[2] : ".");
  if (!mkdtemp(dir)) {
    perror(dir);
    return 1;
  }
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  remove_tree(dir);
  return failed;
}
