// What causal attention does between its matrix products: heads side by side become tiles of pairs and back, and scores become
// probabilities, their gradients those of the scores.
//
// B batch · T positions · G key-value heads · J query heads of one · H = G J query heads · P head width · N = B G pairs of a
// sequence and a key-value head · W queries of a tile · L keys that they see.
#include "vector.h"

using namespace zexp;

namespace {

constexpr int64_t LANES = 16;  // rows are computed in multiples of it: what is left over would be computed one by one

// The part of (B, T, H, P) that a tile has: pairs first .. first + pairs, positions start .. start + rows.
struct Part {
    int64_t groups, heads, width;  // G, J, P
    int64_t first, pairs, start, rows;
    int64_t sequence, position, head;  // elements from one to the next, of P side by side

    int64_t count() const { return pairs * heads; }

    int64_t place(int64_t number) const {
        int64_t pair = first + number / heads;
        return pair / groups * sequence + (pair % groups * heads + number % heads) * head + start * position;
    }
};

// (B, T, H, P) -> (pairs, J, rows, P).
template <class T>
void gather(const T* x, T* tile, Part part, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t number = 0; number < part.count(); number++) {
        const T* from = x + part.place(number);
        T* to = tile + number * part.rows * part.width;
        for (int64_t row = 0; row < part.rows; row++)
            std::memcpy(to + row * part.width, from + row * part.position, part.width * sizeof(T));
    }
}

// (pairs, J, rows, P) -> (B, T, H, P).
template <class From, class T>
void scatter(const From* tile, T* x, Part part, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t number = 0; number < part.count(); number++) {
        const From* from = tile + number * part.rows * part.width;
        T* to = x + part.place(number);
        for (int64_t row = 0; row < part.rows; row++)
#pragma omp simd
            for (int64_t p = 0; p < part.width; p++) to[row * part.position + p] = stored<T>(load(from[row * part.width + p]));
    }
}

// sum (pairs, length, P) at the positions start .. start + rows, plus product (pairs, rows, P).
template <class T>
void add(const T* product, float* sum, int64_t pairs, int64_t length, int64_t width, int64_t start, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t pair = 0; pair < pairs; pair++) {
        const T* from = product + pair * rows * width;
        float* to = sum + (pair * length + start) * width;
#pragma omp simd
        for (int64_t i = 0; i < rows * width; i++) to[i] += load(from[i]);
    }
}

// Scores of the queries start .. start + rows of some pairs against the keys from .. from + keys: (pairs, J, W, L).
struct Scores {
    int64_t groups, heads, length;  // G, J, T
    int64_t first, pairs, start, rows, from, keys;
    int64_t window;  // 0: all
    float scale;

    int64_t count() const { return pairs * heads * rows; }

    // The keys begin .. end of the tile that its row sees, which are neighbours: a document is one run. firsts (B, T): where
    // a position's document begins; null: at 0.
    void seen(int64_t row, const int64_t* firsts, int64_t& begin, int64_t& end) const {
        int64_t t = start + row % rows, sequence = (first + row / (rows * heads)) / groups;
        int64_t earliest = firsts == nullptr ? 0 : firsts[sequence * length + t];
        if (window > 0) earliest = std::max(earliest, t - window + 1);
        begin = std::max(earliest - from, int64_t(0));
        end = t + 1 - from;
    }

    // A row of (N, J, T).
    int64_t kept(int64_t row) const { return (first * heads + row / rows) * length + start + row % rows; }
};

inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

template <class T>
inline void write(T* to, const float* values, int64_t begin, int64_t end, int64_t keys) {
    for (int64_t l = 0; l < begin; l++) to[l] = stored<T>(0.0f);
#pragma omp simd
    for (int64_t l = begin; l < end; l++) to[l] = stored<T>(values[l - begin]);
    for (int64_t l = end; l < keys; l++) to[l] = stored<T>(0.0f);
}

// Probabilities in the place of scores. kept: of each row (N, J, T) its largest scaled score, and 1 / the sum of its exponentials.
template <class T>
void softmax(T* scores, const int64_t* firsts, float* kept, Scores size, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(whole(size.keys));
        float* p = room.data();
#pragma omp for
        for (int64_t row = 0; row < size.count(); row++) {
            T* at = scores + row * size.keys;
            int64_t begin, end;
            size.seen(row, firsts, begin, end);
            int64_t count = end - begin, filled = whole(count);
            float largest = -INFINITY, sum = 0.0f;
#pragma omp simd
            for (int64_t l = 0; l < count; l++) p[l] = load(at[begin + l]) * size.scale;
            for (int64_t l = count; l < filled; l++) p[l] = -INFINITY;
#pragma omp simd reduction(max : largest)
            for (int64_t l = 0; l < filled; l++) largest = p[l] > largest ? p[l] : largest;
#pragma omp simd reduction(+ : sum)
            for (int64_t l = 0; l < filled; l++) {
                p[l] = exp(p[l] - largest);
                sum += p[l];
            }
            float share = 1.0f / sum;
#pragma omp simd
            for (int64_t l = 0; l < filled; l++) p[l] *= share;
            write(at, p, begin, end, size.keys);
            kept[2 * size.kept(row)] = largest;
            kept[2 * size.kept(row) + 1] = share;
        }
    }
}

// Probabilities again in the place of scores, and in the place of their gradients those of the products q k:
// scale p (dp - sum of dp p).
template <class T>
void softmax_backward(T* scores, T* grads, const int64_t* firsts, const float* kept, Scores size, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(2 * whole(size.keys));
        float *p = room.data(), *dp = p + whole(size.keys);
#pragma omp for
        for (int64_t row = 0; row < size.count(); row++) {
            T *at = scores + row * size.keys, *grad = grads + row * size.keys;
            int64_t begin, end;
            size.seen(row, firsts, begin, end);
            int64_t count = end - begin, filled = whole(count);
            float largest = kept[2 * size.kept(row)], share = kept[2 * size.kept(row) + 1], sum = 0.0f;
#pragma omp simd
            for (int64_t l = 0; l < count; l++) {
                p[l] = load(at[begin + l]) * size.scale;
                dp[l] = load(grad[begin + l]);
            }
            for (int64_t l = count; l < filled; l++) {
                p[l] = -INFINITY;
                dp[l] = 0.0f;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t l = 0; l < filled; l++) {
                p[l] = exp(p[l] - largest) * share;
                sum += p[l] * dp[l];
            }
#pragma omp simd
            for (int64_t l = 0; l < filled; l++) dp[l] = size.scale * p[l] * (dp[l] - sum);
            write(at, p, begin, end, size.keys);
            write(grad, dp, begin, end, size.keys);
        }
    }
}

}  // namespace

#define PART                                                                                                                   \
    int64_t groups, int64_t heads, int64_t width, int64_t first, int64_t pairs, int64_t start, int64_t rows, int64_t sequence, \
        int64_t position, int64_t head, int64_t threads
#define THE_PART {groups, heads, width, first, pairs, start, rows, sequence, position, head}, int(threads)
#define SCORES                                                                                                                 \
    int64_t groups, int64_t heads, int64_t length, int64_t first, int64_t pairs, int64_t start, int64_t rows, int64_t from,    \
        int64_t keys, int64_t window, float scale, int64_t threads
#define THE_SCORES {groups, heads, length, first, pairs, start, rows, from, keys, window, scale}, int(threads)

#define EXPORT(T, NAME)                                                                                                        \
    extern "C" void gather_##NAME(const T* x, T* tile, PART) { gather(x, tile, THE_PART); }                                    \
    extern "C" void scatter_##NAME(const T* tile, T* x, PART) { scatter(tile, x, THE_PART); }                                  \
    extern "C" void scatter_sum_##NAME(const float* sum, T* x, PART) { scatter(sum, x, THE_PART); }                            \
    extern "C" void add_##NAME(const T* product, float* sum, int64_t pairs, int64_t length, int64_t width, int64_t start,      \
                               int64_t rows, int64_t threads) {                                                                \
        add(product, sum, pairs, length, width, start, rows, int(threads));                                                    \
    }                                                                                                                          \
    extern "C" void softmax_##NAME(T* scores, const int64_t* firsts, float* kept, SCORES) {                                    \
        softmax(scores, firsts, kept, THE_SCORES);                                                                             \
    }                                                                                                                          \
    extern "C" void softmax_backward_##NAME(T* scores, T* grads, const int64_t* firsts, const float* kept, SCORES) {           \
        softmax_backward(scores, grads, firsts, kept, THE_SCORES);                                                             \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
