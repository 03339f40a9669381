// calls.cpp: functions that do nothing, to learn what a call costs: by how many arguments it has, pointers and 32-bit integers in turn as in
// the ABI's entries, and by what the arguments are. `peek` reads what a view reads, through a call.
#include <cstdint>

#define CALL extern "C" __attribute__((visibility("default"))) int32_t

CALL call0() { return 0; }
CALL call2(void*, int32_t) { return 0; }
CALL call4(void*, int32_t, void*, int32_t) { return 0; }
CALL call8(void*, int32_t, void*, int32_t, void*, int32_t, void*, int32_t) { return 0; }
CALL integers(int32_t, int32_t, int32_t, int32_t) { return 0; }
CALL sizes(uint64_t, uint64_t, uint64_t, uint64_t) { return 0; }
CALL pointers(void*, void*, void*, void*) { return 0; }
CALL peek(const volatile int32_t* at) { return *at; }
