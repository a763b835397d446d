// What surrounds the matrix products of state-space duality: cpp_backend.py has the order of things.
//
// B batch, T positions, H heads, P head width, G groups, N state size, Q chunk, C chunks of a row, M = B C chunks of all rows,
// J = H / G heads of a group. Positions from T to the end of the last chunk are zero. Decays are exponentials of differences of
// running sums, at most 1, and nothing is subtracted that was rounded twice: the gradient of a running sum is made of the rounded
// numbers that both of its ends see, so that what one end receives the other loses to the last bit of fp32.
#include "vector.h"

using namespace zexp;

namespace {

struct Sizes {
    int64_t batch, length, chunk, heads, width, groups, state;
    int64_t x_sequence, x_row, b_sequence, b_row, c_sequence, c_row;  // elements from one sequence, or position, to the next

    int64_t chunks() const { return (length + chunk - 1) / chunk; }
    int64_t inner() const { return heads / groups * width; }
};

constexpr int64_t LANES = 16;

// Of one chunk: where it lies, and what document boundaries cut.
struct Chunk {
    int64_t row, first, count;          // its sequence, its first position, its positions within the sequence
    bool continues;                     // its first document reaches back into the chunk before
    std::vector<int64_t> document;      // of each position: the first position of its document within the chunk

    Chunk(const Sizes& size, int64_t m, const int64_t* ids) : document(size.chunk, 0) {
        row = m / size.chunks();
        first = m % size.chunks() * size.chunk;
        count = std::min(size.chunk, size.length - first);
        continues = true;
        if (ids == nullptr) return;
        const int64_t* own = ids + row * size.length + first;
        continues = first == 0 || own[-1] == own[0];  // the first chunk is entered by a state of zeros
        for (int64_t q = 1; q < size.chunk; q++) document[q] = q >= count || own[q] == own[q - 1] ? document[q - 1] : q;
    }

    bool enters(int64_t q) const { return continues && document[q] == 0; }
    bool leaves(int64_t q) const { return document[q] == document.back(); }
};

inline float decay(bool passes, float log) { return passes ? exp(log) : 0.0f; }

// Of each chunk: running sums of dt a (M, H, Q); x dt by head (M, H, Q, P); x dt times what of it reaches the chunk's end
// (M, G, Q, J P); B and C by group (M, G, Q, N). In a backward pass (dy not null) dy by head, and dy times what of the entering
// state it read (M, G, Q, J P).
template <class T>
void enter(const Sizes& size, const T* x, const float* dt, const float* a, const T* b, const T* c, const int64_t* ids, const T* dy,
           float* sums, T* written, T* leaving, T* b_packed, T* c_packed, T* dy_heads, T* dread, int threads) {
    int64_t Q = size.chunk, H = size.heads, P = size.width, G = size.groups, N = size.state, J = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < size.batch * size.chunks(); m++) {
        Chunk at(size, m, ids);
        float* sum = sums + m * H * Q;
        for (int64_t h = 0; h < H; h++) {
            float running = 0.0f;
            for (int64_t q = 0; q < Q; q++) {
                if (q < at.count) running += dt[(at.row * size.length + at.first + q) * H + h] * a[h];
                sum[h * Q + q] = running;
            }
        }
        for (int64_t q = 0; q < Q; q++) {
            int64_t t = at.first + q;
            bool inside = q < at.count;
            for (int64_t h = 0; h < H; h++) {
                T* own = written + ((m * H + h) * Q + q) * P;
                int64_t grouped = ((m * G + h / J) * Q + q) * J * P + h % J * P;
                T* out = leaving + grouped;
                if (!inside) {
                    std::memset(own, 0, P * sizeof(T));
                    std::memset(out, 0, P * sizeof(T));
                    if (dy != nullptr) {
                        std::memset(dy_heads + ((m * H + h) * Q + q) * P, 0, P * sizeof(T));
                        std::memset(dread + grouped, 0, P * sizeof(T));
                    }
                    continue;
                }
                const T* from = x + at.row * size.x_sequence + t * size.x_row + h * P;
                float step = dt[(at.row * size.length + t) * H + h];
                float reaches = step * decay(at.leaves(q), sum[h * Q + Q - 1] - sum[h * Q + q]);
#pragma omp simd
                for (int64_t p = 0; p < P; p++) {
                    own[p] = stored<T>(load(from[p]) * step);
                    out[p] = stored<T>(load(from[p]) * reaches);
                }
                if (dy == nullptr) continue;
                const T* given = dy + ((at.row * size.length + t) * H + h) * P;
                T *kept = dy_heads + ((m * H + h) * Q + q) * P, *read = dread + grouped;
                float seen = decay(at.enters(q), sum[h * Q + q]);
                std::memcpy(kept, given, P * sizeof(T));
#pragma omp simd
                for (int64_t p = 0; p < P; p++) read[p] = stored<T>(load(given[p]) * seen);
            }
            for (int64_t g = 0; g < G; g++) {
                T *b_to = b_packed + ((m * G + g) * Q + q) * N, *c_to = c_packed + ((m * G + g) * Q + q) * N;
                if (!inside) {
                    std::memset(b_to, 0, N * sizeof(T));
                    std::memset(c_to, 0, N * sizeof(T));
                    continue;
                }
                std::memcpy(b_to, b + at.row * size.b_sequence + t * size.b_row + g * N, N * sizeof(T));
                std::memcpy(c_to, c + at.row * size.c_sequence + t * size.c_row + g * N, N * sizeof(T));
            }
        }
    }
}

// Of each head, what of the state that enters a chunk is left at its end.
void carries(const Sizes& size, const float* sums, const int64_t* ids, float* carry_MH, int threads) {
    int64_t Q = size.chunk, H = size.heads;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < size.batch * size.chunks(); m++) {
        Chunk at(size, m, ids);
        for (int64_t h = 0; h < H; h++) carry_MH[m * H + h] = decay(at.enters(Q - 1), sums[(m * H + h) * Q + Q - 1]);
    }
}

// The state that enters each chunk (M, G, N, J P) from what each chunk adds to it; carried in fp32. initial: the state before the
// first chunk (B, G, N, J P), null: zeros. last: the state after the last chunk; null: it is not asked for.
template <class T>
void carry(const Sizes& size, const T* leaving, const float* carry_MH, const float* initial, T* entering, float* last, int threads) {
    int64_t H = size.heads, P = size.width, G = size.groups, N = size.state, J = H / G, C = size.chunks(), inner = size.inner();
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t bg = 0; bg < size.batch * G; bg++) {
        for (int64_t n = 0; n < N; n++) {
            int64_t b = bg / G, g = bg % G;
            std::vector<float> state(inner, 0.0f);
            if (initial != nullptr) std::memcpy(state.data(), initial + (bg * N + n) * inner, inner * sizeof(float));
            for (int64_t c = 0; c < C; c++) {
                int64_t m = b * C + c, at = ((m * G + g) * N + n) * inner;
                for (int64_t j = 0; j < J; j++) {
                    float kept = carry_MH[m * H + g * J + j];
                    float* own = state.data() + j * P;
                    T* to = entering + at + j * P;
                    const T* added = leaving + at + j * P;
#pragma omp simd
                    for (int64_t p = 0; p < P; p++) {
                        to[p] = stored<T>(own[p]);
                        own[p] = own[p] * kept + load(added[p]);
                    }
                }
            }
            if (last != nullptr) std::memcpy(last + (bg * N + n) * inner, state.data(), inner * sizeof(float));
        }
    }
}

// Backwards: the gradient of what each chunk adds (M, G, N, J P), and dsum (M, H, N): of the running sum at a chunk's end, by the
// state that passes through it, a row of the state each.
template <class T>
void carry_backward(const Sizes& size, const T* dentering, const T* entering, const float* carry_MH, T* dleaving, float* dsum,
                    int threads) {
    int64_t H = size.heads, P = size.width, G = size.groups, N = size.state, J = H / G, C = size.chunks(), inner = size.inner();
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t bg = 0; bg < size.batch * G; bg++) {
        for (int64_t n = 0; n < N; n++) {
            int64_t b = bg / G, g = bg % G;
            std::vector<float> dstate(inner, 0.0f);  // of the state that leaves the chunk
            for (int64_t c = C - 1; c >= 0; c--) {
                int64_t m = b * C + c, at = ((m * G + g) * N + n) * inner;
                for (int64_t j = 0; j < J; j++) {
                    int64_t h = g * J + j;
                    float kept = carry_MH[m * H + h], along = 0.0f;
                    float* own = dstate.data() + j * P;
                    T* to = dleaving + at + j * P;
                    const T *before = entering + at + j * P, *given = dentering + at + j * P;
#pragma omp simd reduction(+ : along)
                    for (int64_t p = 0; p < P; p++) {
                        to[p] = stored<T>(own[p]);
                        along += own[p] * load(before[p]);
                        own[p] = own[p] * kept + load(given[p]);
                    }
                    dsum[(m * H + h) * N + n] = along * kept;
                }
            }
        }
    }
}

// exp(sum_i - sum_j) of one row i for j from `from` to i, 0 elsewhere.
inline void decays(float* out, const float* sum, int64_t i, int64_t from, int64_t limit) {
    float own = sum[i];
#pragma omp simd
    for (int64_t j = 0; j < limit; j++) {
        float value = exp(std::min(own - sum[j], 0.0f));
        out[j] = j <= i && j >= from ? value : 0.0f;
    }
}

inline int64_t up_to(int64_t i, int64_t Q) { return std::min(Q, (i / LANES + 1) * LANES); }

// Weights with which position i reads j of its chunk: scores (M, G, Q, Q) times decays, (M, H, Q, Q), of `count` chunks from m0.
template <class T>
void weigh(const Sizes& size, const float* sums, const int64_t* ids, const T* scores, T* weights, int64_t m0, int64_t count,
           int threads) {
    int64_t Q = size.chunk, H = size.heads, G = size.groups, J = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = m0; m < m0 + count; m++) {
        Chunk at(size, m, ids);
        std::vector<float> row(Q);
        for (int64_t h = 0; h < H; h++) {
            for (int64_t i = 0; i < Q; i++) {
                int64_t limit = up_to(i, Q);
                decays(row.data(), sums + (m * H + h) * Q, i, at.document[i], limit);
                const T* score = scores + ((m * G + h / J) * Q + i) * Q;
                T* to = weights + (((m - m0) * H + h) * Q + i) * Q;
#pragma omp simd
                for (int64_t j = 0; j < limit; j++) to[j] = stored<T>(load(score[j]) * row[j]);
                std::memset(to + limit, 0, (Q - limit) * sizeof(T));
            }
        }
    }
}

// From square (M, H, Q, Q) = dy x dt^T: the weights once more, the scores' gradients (M, G, Q, Q), and dsums (M, H, Q): what each
// running sum receives from the positions that it reads and loses to those that read it.
template <class T>
void weigh_backward(const Sizes& size, const float* sums, const int64_t* ids, const T* scores, const T* square, T* weights,
                    T* dscores, float* dsums, int64_t m0, int64_t count, int threads) {
    int64_t Q = size.chunk, H = size.heads, G = size.groups, J = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = m0; m < m0 + count; m++) {
        Chunk at(size, m, ids);
        std::vector<float> row(Q), total(Q * Q), columns(Q);
        for (int64_t g = 0; g < G; g++) {
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t h = g * J; h < (g + 1) * J; h++) {
                std::fill(columns.begin(), columns.end(), 0.0f);
                float* dsum = dsums + (m * H + h) * Q;
                for (int64_t i = 0; i < Q; i++) {
                    int64_t limit = up_to(i, Q), place = (((m - m0) * H + h) * Q + i) * Q;
                    decays(row.data(), sums + (m * H + h) * Q, i, at.document[i], limit);
                    const T *score = scores + ((m * G + g) * Q + i) * Q, *given = square + place;
                    T* to = weights + place;
                    float *added = total.data() + i * Q, *column = columns.data(), along = 0.0f;
                    const float* weight = row.data();
#pragma omp simd reduction(+ : along)
                    for (int64_t j = 0; j < limit; j++) {
                        float dscore = load(given[j]) * weight[j];
                        added[j] += dscore;
                        float own = load(score[j]);
                        to[j] = stored<T>(own * weight[j]);
                        float both = dscore * own;
                        along += both;
                        column[j] += both;
                    }
                    std::memset(to + limit, 0, (Q - limit) * sizeof(T));
                    dsum[i] = along;
                }
                for (int64_t j = 0; j < Q; j++) dsum[j] -= columns[j];
            }
            T* out = dscores + (m * G + g) * Q * Q;
#pragma omp simd
            for (int64_t ij = 0; ij < Q * Q; ij++) out[ij] = stored<T>(total[ij]);
        }
    }
}

// y (B, T, H, P): what was read of the entering state (M, G, Q, J P), of the chunk itself (M, H, Q, P, from m0), and d x.
template <class T>
void leave(const Sizes& size, const T* x, const float* d, const float* sums, const int64_t* ids, const T* read, const T* inside,
           T* y, int64_t m0, int64_t count, int threads) {
    int64_t Q = size.chunk, H = size.heads, P = size.width, G = size.groups, J = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = m0; m < m0 + count; m++) {
        Chunk at(size, m, ids);
        for (int64_t q = 0; q < at.count; q++) {
            int64_t t = at.first + q;
            for (int64_t h = 0; h < H; h++) {
                float seen = decay(at.enters(q), sums[(m * H + h) * Q + q]), direct = d[h];
                const T *from = x + at.row * size.x_sequence + t * size.x_row + h * P, *own = inside + (((m - m0) * H + h) * Q + q) * P;
                const T* state = read + ((m * G + h / J) * Q + q) * J * P + h % J * P;
                T* to = y + ((at.row * size.length + t) * H + h) * P;
#pragma omp simd
                for (int64_t p = 0; p < P; p++)
                    to[p] = stored<T>(load(state[p]) * seen + load(own[p]) + load(from[p]) * direct);
            }
        }
    }
}

// The gradients of x (B, T, H, P) and dt (B, T, H), and of a and d a chunk (M, H) each. dreached (M, G, Q, J P): of x dt as far as
// it reached the chunk's end; dinside (M, H, Q, P, from m0): of x dt by the chunk itself; dread and read (M, G, Q, J P): dy as it
// read the entering state, and what it read.
template <class T>
void leave_backward(const Sizes& size, const T* x, const float* dt, const float* a, const float* d, const float* sums,
                    const int64_t* ids, const T* dy, const T* read, const T* dread, const T* dreached, const T* dinside,
                    const float* dsums, const float* dcarried, T* dx, float* ddt, float* da, float* dd, int64_t m0, int64_t count,
                    int threads) {
    int64_t Q = size.chunk, H = size.heads, P = size.width, G = size.groups, N = size.state, J = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = m0; m < m0 + count; m++) {
        Chunk at(size, m, ids);
        // By position, then head, as most arrays lie: read in the order of memory.
        std::vector<float> dsum(Q * H), dstep(Q * H), ends(H, 0.0f), direct(H, 0.0f);
        for (int64_t q = 0; q < at.count; q++) {
            int64_t t = at.first + q;
            for (int64_t h = 0; h < H; h++) {
                int64_t grouped = ((m * G + h / J) * Q + q) * J * P + h % J * P, place = (at.row * size.length + t) * H + h;
                const float* sum = sums + (m * H + h) * Q;
                const T *from = x + at.row * size.x_sequence + t * size.x_row + h * P;
                const T *own = dinside + (((m - m0) * H + h) * Q + q) * P, *given = dy + place * P, *reached = dreached + grouped;
                const T *seen = read + grouped, *dseen = dread + grouped;
                T* to = dx + place * P;
                float step = dt[place], through = decay(at.leaves(q), sum[Q - 1] - sum[q]);
                float skip = d[h], by_end = 0.0f, by_step = 0.0f, by_x = 0.0f, by_state = 0.0f;
#pragma omp simd reduction(+ : by_end, by_step, by_x, by_state)
                for (int64_t p = 0; p < P; p++) {
                    float input = load(from[p]), dout = load(given[p]), later = load(reached[p]) * through;
                    float dwritten = later + load(own[p]);
                    by_end += later * input;
                    by_step += dwritten * input;
                    by_x += dout * input;
                    by_state += load(dseen[p]) * load(seen[p]);
                    to[p] = stored<T>(dwritten * step + dout * skip);
                }
                by_end *= step;
                ends[h] += by_end;
                direct[h] += by_x;
                dsum[q * H + h] = dsums[(m * H + h) * Q + q] + by_state - by_end;
                dstep[q * H + h] = by_step;
            }
        }
        for (int64_t h = 0; h < H; h++) {
            for (int64_t n = 0; n < N; n++) ends[h] += dcarried[(m * H + h) * N + n];
            // The end of a chunk that the sequence does not fill is that of its last position.
            for (int64_t q = at.count; q < Q; q++) ends[h] += dsums[(m * H + h) * Q + q];
            dsum[(at.count - 1) * H + h] += ends[h];
            float running = 0.0f, rate = 0.0f;
            for (int64_t q = at.count - 1; q >= 0; q--) {
                int64_t place = (at.row * size.length + at.first + q) * H + h;
                running += dsum[q * H + h];
                rate += running * dt[place];
                ddt[place] = dstep[q * H + h] + running * a[h];
            }
            da[m * H + h] = rate;
            dd[m * H + h] = direct[h];
        }
    }
}

// One gradient (B, T, G, N) of its two parts (M, G, Q, N).
template <class T>
void unpack(const Sizes& size, const T* one, const T* other, T* out, int threads) {
    int64_t Q = size.chunk, G = size.groups, N = size.state;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < size.batch * size.chunks(); m++) {
        Chunk at(size, m, nullptr);
        for (int64_t g = 0; g < G; g++) {
            for (int64_t q = 0; q < at.count; q++) {
                int64_t from = ((m * G + g) * Q + q) * N;
                T* to = out + ((at.row * size.length + at.first + q) * G + g) * N;
#pragma omp simd
                for (int64_t n = 0; n < N; n++) to[n] = stored<T>(load(one[from + n]) + load(other[from + n]));
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                          \
    extern "C" {                                                                                                                 \
    void enter_##NAME(const Sizes* size, const T* x, const float* dt, const float* a, const T* b, const T* c, const int64_t* ids, \
                      const T* dy, float* sums, T* written, T* leaving, T* b_packed, T* c_packed, T* dy_heads, T* dread,          \
                      float* carry_MH, int64_t threads) {                                                                        \
        enter(*size, x, dt, a, b, c, ids, dy, sums, written, leaving, b_packed, c_packed, dy_heads, dread, threads);              \
        carries(*size, sums, ids, carry_MH, threads);                                                                            \
    }                                                                                                                            \
    void carry_##NAME(const Sizes* size, const T* leaving, const float* carry_MH, const float* initial, T* entering, float* last,\
                      int64_t threads) {                                                                                         \
        carry(*size, leaving, carry_MH, initial, entering, last, threads);                                                       \
    }                                                                                                                            \
    void carry_backward_##NAME(const Sizes* size, const T* dentering, const T* entering, const float* carry_MH, T* dleaving,     \
                               float* dsum, int64_t threads) {                                                                   \
        carry_backward(*size, dentering, entering, carry_MH, dleaving, dsum, threads);                                           \
    }                                                                                                                            \
    void weigh_##NAME(const Sizes* size, const float* sums, const int64_t* ids, const T* scores, T* weights, int64_t m0,         \
                      int64_t count, int64_t threads) {                                                                          \
        weigh(*size, sums, ids, scores, weights, m0, count, threads);                                                            \
    }                                                                                                                            \
    void weigh_backward_##NAME(const Sizes* size, const float* sums, const int64_t* ids, const T* scores, const T* square,       \
                               T* weights, T* dscores, float* dsums, int64_t m0, int64_t count, int64_t threads) {               \
        weigh_backward(*size, sums, ids, scores, square, weights, dscores, dsums, m0, count, threads);                           \
    }                                                                                                                            \
    void leave_##NAME(const Sizes* size, const T* x, const float* d, const float* sums, const int64_t* ids, const T* read,       \
                      const T* inside, T* y, int64_t m0, int64_t count, int64_t threads) {                                       \
        leave(*size, x, d, sums, ids, read, inside, y, m0, count, threads);                                                      \
    }                                                                                                                            \
    void leave_backward_##NAME(const Sizes* size, const T* x, const float* dt, const float* a, const float* d, const float* sums, \
                               const int64_t* ids, const T* dy, const T* read, const T* dread, const T* dreached,                \
                               const T* dinside, const float* dsums, const float* dcarried, T* dx, float* ddt, float* da,        \
                               float* dd, int64_t m0, int64_t count, int64_t threads) {                                          \
        leave_backward(*size, x, dt, a, d, sums, ids, dy, read, dread, dreached, dinside, dsums, dcarried, dx, ddt, da, dd, m0,  \
                       count, threads);                                                                                          \
    }                                                                                                                            \
    void unpack_##NAME(const Sizes* size, const T* one, const T* other, T* out, int64_t threads) {                               \
        unpack(*size, one, other, out, threads);                                                                                 \
    }                                                                                                                            \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
