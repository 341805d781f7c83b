// What the loader asks a library about itself.
#include "common.h"

// The level that this library was compiled for.
EVERSTEP_API const char* everstep_level() {
#if defined(__AMX_BF16__)
    return "amx";
#elif defined(__AVX512BF16__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "portable";
#endif
}

// 1: a multiply-add is rounded once; 0: twice.
EVERSTEP_API int everstep_has_fma() {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
    return 1;
#else
    return 0;
#endif
}

// e^x of `count` floats, as every kernel here computes it; for tests.
EVERSTEP_API void everstep_exp(const float* x, float* y, std::int64_t count) {
    using namespace everstep;
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const auto lanes = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
        store_first(y + i, exp(load_first(x + i, lanes)), lanes);
    }
}
