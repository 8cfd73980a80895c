/* sfa export: a Hugging Face directory as a GGUF file. */
#include "app.h"

#include <sfa/train.h>

int cmd_export(const app_options *o) {
  static const sfa_dtype types[] = {SFA_BF16, SFA_F16, SFA_F32};
  if (!o->model || !o->gguf)
    return app_usage("export wants a model and a file: -m DIR --gguf FILE");
  app a = {.o = o};
  int status = app_open_context(&a, o, o->threads, SFA_ISA_DEFAULT);
  if (!status && sfa_model_export_gguf(a.ctx, o->model, o->gguf, types[o->export_type]) != SFA_OK)
    status = app_fail_status(a.ctx);
  app_close(&a);
  return status;
}
