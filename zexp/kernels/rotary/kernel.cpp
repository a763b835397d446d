// Rotary position embedding, rotate-half. B batch · T positions · H heads · P head width · R turned channels of a head.
#include "vector.h"

using namespace zexp;

namespace {

// x (B, T, H, P), its strides in elements, channels side by side; cos and sin (T, R/2); y (B, T, H, P). direction: 1 turns, -1 back.
template <class T>
void turn(const T* x, const float* cosines, const float* sines, T* y, int64_t batch, int64_t length, int64_t heads, int64_t width,
          int64_t turned, int64_t sequence, int64_t position, int64_t head, float direction, int threads) {
    int64_t half = turned / 2;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t t = 0; t < length; t++) {
            const float *cosine = cosines + t * half, *sine = sines + t * half;
            for (int64_t h = 0; h < heads; h++) {
                const T *first = x + b * sequence + t * position + h * head, *second = first + half;
                T *out = y + ((b * length + t) * heads + h) * width, *out_second = out + half;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float s = direction * sine[i], one = load(first[i]), other = load(second[i]);
                    out[i] = stored<T>(one * cosine[i] - other * s);
                    out_second[i] = stored<T>(other * cosine[i] + one * s);
                }
                if (turned < width) std::memcpy(out + turned, first + turned, (width - turned) * sizeof(T));
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                        \
    extern "C" void turn_##NAME(const T* x, const float* cosines, const float* sines, T* y, int64_t batch, int64_t length,     \
                                int64_t heads, int64_t width, int64_t turned, int64_t sequence, int64_t position,              \
                                int64_t head, float direction, int64_t threads) {                                              \
        turn(x, cosines, sines, y, batch, length, heads, width, turned, sequence, position, head, direction, threads);         \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
