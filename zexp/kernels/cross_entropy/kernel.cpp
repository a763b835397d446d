// Of rows of logits: the loss of each, and the logits' gradient in their place. R rows, V vocabulary.
#include "vector.h"

using namespace zexp;

namespace {

// e^2x - 1 over e^2x + 1, with what large x make of it; near 0 to 1e-7, not to the last bit.
inline float tanh_of(float x) {
    float power = exp(2.0f * std::min(std::max(x, -15.0f), 15.0f));
    return (power - 1.0f) / (power + 1.0f);
}

// softcap: c, logits are c tanh(logits / c); 0 = as they are. A label below 0 is left out: no loss, no gradient.
template <class T, bool CAPPED>
void loss(T* logits, const int64_t* labels, float* losses, int64_t rows, int64_t vocabulary, float softcap, bool gradient,
          int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(vocabulary), slopes(CAPPED ? vocabulary : 0);
        float *row = room.data(), *slope = slopes.data();
#pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            T* own = logits + r * vocabulary;
            if (labels[r] < 0) {
                losses[r] = 0.0f;
                if (gradient) std::memset(own, 0, vocabulary * sizeof(T));
                continue;
            }
            float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
            for (int64_t v = 0; v < vocabulary; v++) {
                float logit = load(own[v]);
                if (CAPPED) {
                    float bent = tanh_of(logit / softcap);
                    slope[v] = 1.0f - bent * bent;
                    logit = softcap * bent;
                }
                row[v] = logit;
                top = std::max(top, logit);
            }
            float picked = row[labels[r]];
#pragma omp simd reduction(+ : sum)
            for (int64_t v = 0; v < vocabulary; v++) {
                row[v] = exp(row[v] - top);
                sum += row[v];
            }
            losses[r] = std::log(sum) + top - picked;
            if (!gradient) continue;
            row[labels[r]] -= sum;  // the probability less 1
            float inverse = 1.0f / sum;
#pragma omp simd
            for (int64_t v = 0; v < vocabulary; v++) {
                float grad = row[v] * inverse;
                own[v] = stored<T>(CAPPED ? grad * slope[v] : grad);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                       \
    extern "C" void loss_##NAME(T* logits, const int64_t* labels, float* losses, int64_t rows, int64_t vocabulary,            \
                                float softcap, int64_t gradient, int64_t threads) {                                           \
        auto run = softcap > 0 ? loss<T, true> : loss<T, false>;                                                              \
        run(logits, labels, losses, rows, vocabulary, softcap, gradient != 0, threads);                                       \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
