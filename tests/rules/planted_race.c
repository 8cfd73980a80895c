/* A data race on purpose: under ThreadSanitizer this program must fail, or the tsan preset proves nothing. */
int main(void) {
  int odd = 0;
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 100000; i++)
    odd += i & 1;
  return odd < 0;
}
