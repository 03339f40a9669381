// calls.cpp: functions that do nothing, of as many arguments as one wants to know the cost of. Pointers and 32-bit integers take turns, as in
// the ABI's entries.
#include <cstdint>

#define CALL extern "C" __attribute__((visibility("default"))) int32_t

CALL call0() { return 0; }
CALL call2(void*, int32_t) { return 0; }
CALL call4(void*, int32_t, void*, int32_t) { return 0; }
CALL call8(void*, int32_t, void*, int32_t, void*, int32_t, void*, int32_t) { return 0; }
CALL call12(void*, int32_t, void*, int32_t, void*, int32_t, void*, int32_t, void*, int32_t, void*, int32_t) { return 0; }
