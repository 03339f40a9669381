// The constants of cuda/freekv.h, under its names; test/abi.test.ts compares the two.

export const FKV_ABI_VERSION = 1;
/** The most `n_top` of a row may be, and the length of fkv_result's lists. */
export const FKV_MAX_TOP = 20;

// Status codes; status.ts says what each one means to a caller.
export const FKV_OK = 0;
export const FKV_BAD_ARGUMENT = 1;
export const FKV_BAD_SHAPE = 2;
export const FKV_OUT_OF_MEMORY = 3;
export const FKV_NO_DEVICE = 4;
export const FKV_ABI_MISMATCH = 5;
export const FKV_CAPTURE = 6;
export const FKV_NOT_RECORDED = 7;
export const FKV_DEVICE_FAILED = 8;
export const FKV_UNSUPPORTED = 9;

// dtypes
export const FKV_F32 = 0;
export const FKV_BF16 = 1;
export const FKV_F16 = 2;

// fkv_phase.epilogue
export const FKV_STORE = 0;
export const FKV_ADD = 1;
export const FKV_SWIGLU = 2;

// `family` of a dense chain and of prefill attention
export const FKV_DECODE = 0;
export const FKV_PREFILL = 1;
export const FKV_FAST = 2;

// fkv_row.correction
export const FKV_CORRECT_OFF = 0;
export const FKV_CORRECT_THRESHOLD = 1;
export const FKV_CORRECT_EXACT = 2;

// fkv_row.speculation
export const FKV_SPECULATE_NONE = 0;
export const FKV_SPECULATE_NEXT = 1;
export const FKV_SPECULATE_LAZY = 2;

// `stage` of a retrieval
export const FKV_NOW = 0;
export const FKV_NEXT = 1;
export const FKV_FIRST = 2;
