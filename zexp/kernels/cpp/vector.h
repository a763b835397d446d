// Numbers and functions of the C++ kernels, written so that a compiler makes vectors of the loops that call them.
//
// Arrays are float or bf16; arithmetic is fp32. A loop over threads cuts its work into parts that do not depend on their number,
// so that neither do the last bits of a sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace zexp {

struct bf16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float load(float x) { return x; }
inline float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

template <class T>
T stored(float x);

template <>
inline float stored<float>(float x) {
    return x;
}

// To the nearest, ties to even; NaN stays NaN.
template <>
inline bf16 stored<bf16>(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16{uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// e^x to 2 ulp: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7. Below -87 it is 0, above 88.37 infinite.
inline float exp(float x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    float shifted = x * 1.44269504f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float power = float_of((bits_of(shifted) - bits_of(shift) + 127) << 23);
    float y = p * power;
    y = x < -87.0f ? 0.0f : y;
    return x > 88.7f ? INFINITY : y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace zexp
