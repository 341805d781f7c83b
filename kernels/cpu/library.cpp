// What the loader asks a library about itself.
#include "common.h"

// The level that this library was compiled for.
EVERSTEP_API const char* everstep_level() {
#if defined(__AMX_BF16__) || defined(EVERSTEP_EMULATE_AMX)
    return "amx";
#elif defined(__AVX512BF16__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "portable";
#endif
}

// 1: calls may use several threads.
EVERSTEP_API int everstep_has_threads() {
#if defined(_OPENMP) || defined(EVERSTEP_STD_THREADS)
    return 1;
#else
    return 0;
#endif
}
