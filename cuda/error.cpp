// error.cpp: the calling thread's error text, in the twin and in the CUDA library.
#include <cstdarg>
#include <cstdio>

#include "checks.h"

namespace {
thread_local char error_text[1024] = "";
}

namespace fkv {

int32_t fail(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace fkv

int32_t fkv_abi_version(void) { return FKV_ABI_VERSION; }
const char* fkv_last_error(void) { return error_text; }
