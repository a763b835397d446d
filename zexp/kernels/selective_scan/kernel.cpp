// The selective scan of Mamba-1 over (batch, time, channel), and its gradient.
//
// B batch · T positions · I inner channels · H heads · P channels of a head (I / H) · N state size · M segments of positions
//
// A tile of channels lies side by side in vectors. It goes through a segment of positions with two of its N rates at a time, whose
// states stay in registers: a decay is computed where it is used. The state that enters a segment is kept; the backward pass
// computes the segment's states and decays again, into arrays that stay in the cache, and goes back through them.
//
// Gradients of B and C are sums over channels: each lane of a vector sums its own ones of a block of channels, the lanes are added
// once a segment, and the blocks in their order, whatever thread computed them.
#include "vector.h"

#include <memory>

using namespace zexp;

namespace {

// Vectors as the compiler knows them: it finds none in loops over rates × lanes whose sums must stay in registers.
constexpr int64_t LANES = 16;
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

constexpr int64_t VECTORS = 2;                // of a tile
constexpr int64_t TILE = VECTORS * LANES;     // channels
constexpr int64_t TILES = 4;                  // of a block
constexpr int64_t BLOCK = TILES * TILE;       // channels of one head that one task computes
constexpr int64_t PAIR = 2;                   // rates that are computed together
constexpr float LOG2_E = 1.44269504f;

struct Sizes {
    int64_t batch, length, heads, width, state;    // B, T, H, P, N
    int64_t b_sequence, b_row, b_head;             // elements of B between sequences, positions and heads
    int64_t c_sequence, c_row, c_head;
    int64_t segment;                               // positions between two kept states

    int64_t channels() const { return heads * width; }
    int64_t blocks() const { return (width + BLOCK - 1) / BLOCK; }  // of a head
    int64_t segments() const { return (length + segment - 1) / segment; }
    int64_t pairs() const { return (state + PAIR - 1) / PAIR; }
};

// 2^u to 2 ulp, for u below 128: 2^n 2^f with |f| <= 1/2, 2^f by a polynomial of least relative error that is 1 at 0, so that what
// hardly decays does not grow. Below -126 it is 0, of -infinity too.
inline lanes exp2(lanes u) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    lanes shifted = u + shift;
    lanes f = u - (shifted - shift);
    lanes p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    bits made = (bits)p + ((bits)shifted << 23);  // n is in the lowest bits of shifted
    return (lanes)(u < -126.0f ? bits{} : made);
}

inline float sum_of(const lanes& x) {
    float half[LANES / 2], sum = 0.0f;
    for (int64_t l = 0; l < LANES / 2; l++) half[l] = x[l] + x[l + LANES / 2];
    for (int64_t l = 0; l < LANES / 2; l += 2) sum += half[l] + half[l + 1];
    return sum;
}

// A row of a tile in fp32; lanes beyond `count` are zero.
struct Row {
    lanes v[VECTORS];
    float* data() { return reinterpret_cast<float*>(v); }
};

template <class T>
inline void fetch(Row& row, const T* from, int64_t count) {
    float* to = row.data();
    if (count == TILE) {
#pragma omp simd
        for (int64_t l = 0; l < TILE; l++) to[l] = load(from[l]);
    } else {
        for (int64_t l = 0; l < TILE; l++) to[l] = l < count ? load(from[l]) : 0.0f;
    }
}

template <class T>
inline void put(T* to, Row& row, int64_t count) {
    const float* from = row.data();
    if (count == TILE) {
#pragma omp simd
        for (int64_t l = 0; l < TILE; l++) to[l] = stored<T>(from[l]);
    } else {
        for (int64_t l = 0; l < count; l++) to[l] = stored<T>(from[l]);
    }
}

// Numbers of two rates at one tile.
struct Pair {
    lanes v[PAIR][VECTORS];
};

// B or C of a segment, two rates side by side: (pairs, segment, 2); a rate beyond N has zeros.
template <class T>
void fetch_pairs(float* to, const T* from, int64_t row, int64_t count, Sizes size) {
    for (int64_t pair = 0; pair < size.pairs(); pair++) {
        for (int64_t t = 0; t < count; t++) {
            for (int64_t k = 0; k < PAIR; k++) {
                int64_t n = pair * PAIR + k;
                to[(pair * size.segment + t) * PAIR + k] = n < size.state ? load(from[t * row + n]) : 0.0f;
            }
        }
    }
}

// What one task computes: a block of channels of a head of a sequence.
struct Part {
    int64_t sequence, head, block;
    int64_t first, count, tiles;  // channels of all, and tiles

    Part(int64_t sequence, int64_t head, int64_t block, Sizes size) : sequence(sequence), head(head), block(block) {
        first = head * size.width + block * BLOCK;
        count = std::min(BLOCK, size.width - block * BLOCK);
        tiles = (count + TILE - 1) / TILE;
    }
    int64_t tile_count(int64_t tile) const { return std::min(TILE, count - tile * TILE); }
};

// The rates of a block, times log2(e): (tiles, pairs).
std::vector<Pair> rates_of(const float* a, Part part, Sizes size) {
    std::vector<Pair> rates(part.tiles * size.pairs(), Pair{});
    for (int64_t i = 0; i < part.count; i++)
        for (int64_t n = 0; n < size.state; n++) {
            Pair& pair = rates[i / TILE * size.pairs() + n / PAIR];
            pair.v[n % PAIR][i % TILE / LANES][i % LANES] = a[(part.first + i) * size.state + n] * LOG2_E;
        }
    return rates;
}

// To and from the kept states (B, M, N, I): two rates of a tile.
inline float* kept_at(float* kept, int64_t segment, int64_t n, const Part& part, int64_t tile, Sizes size) {
    int64_t row = (part.sequence * size.segments() + segment) * size.state + n;
    return kept + row * size.channels() + part.first + tile * TILE;
}

void keep(float* kept, int64_t segment, int64_t pair, const Pair& state, const Part& part, int64_t tile, Sizes size) {
    for (int64_t k = 0; k < PAIR && pair * PAIR + k < size.state; k++)
        std::memcpy(kept_at(kept, segment, pair * PAIR + k, part, tile, size), state.v[k], part.tile_count(tile) * sizeof(float));
}

Pair recalled(float* kept, int64_t segment, int64_t pair, const Part& part, int64_t tile, Sizes size) {
    Pair state{};
    for (int64_t k = 0; k < PAIR && pair * PAIR + k < size.state; k++)
        std::memcpy(state.v[k], kept_at(kept, segment, pair * PAIR + k, part, tile, size), part.tile_count(tile) * sizeof(float));
    return state;
}

// x, dt, y (B, T, I); a (I, N); starts (B, T) or null; kept (B, M, N, I) or null.
template <class T>
void forward_part(const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d, const uint8_t* starts, T* y,
                  float* kept, Part part, Sizes size) {
    std::vector<Pair> rates = rates_of(a, part, size), states(part.tiles * size.pairs(), Pair{});
    std::vector<Row> steps(size.segment), written(size.segment), sums(size.segment);
    std::vector<float> writes(size.pairs() * size.segment * PAIR), reads(writes.size());
    for (int64_t segment = 0; segment < size.segments(); segment++) {
        int64_t begin = segment * size.segment, length = std::min(size.segment, size.length - begin);
        int64_t at = part.sequence * size.length + begin;
        const uint8_t* start = starts == nullptr ? nullptr : starts + at;
        fetch_pairs(writes.data(), b + part.sequence * size.b_sequence + begin * size.b_row + part.head * size.b_head, size.b_row,
                    length, size);
        fetch_pairs(reads.data(), c + part.sequence * size.c_sequence + begin * size.c_row + part.head * size.c_head, size.c_row,
                    length, size);
        for (int64_t tile = 0; tile < part.tiles; tile++) {
            int64_t count = part.tile_count(tile), first = part.first + tile * TILE;
            Row skip;
            fetch(skip, d + first, count);
            for (int64_t t = 0; t < length; t++) {
                int64_t row = (at + t) * size.channels() + first;
                Row in;
                fetch(in, x + row, count);
                fetch(steps[t], dt + row, count);
                for (int64_t v = 0; v < VECTORS; v++) {
                    written[t].v[v] = in.v[v] * steps[t].v[v];
                    sums[t].v[v] = in.v[v] * skip.v[v];
                }
            }
            for (int64_t pair = 0; pair < size.pairs(); pair++) {
                Pair& slot = states[tile * size.pairs() + pair];
                Pair state = slot, rate = rates[tile * size.pairs() + pair];
                if (kept != nullptr) keep(kept, segment, pair, state, part, tile, size);
                const float* write = writes.data() + pair * size.segment * PAIR;
                const float* read = reads.data() + pair * size.segment * PAIR;
                for (int64_t t = 0; t < length; t++) {
                    if (start != nullptr && start[t]) state = Pair{};
#pragma GCC unroll 2
                    for (int64_t v = 0; v < VECTORS; v++) {
                        lanes step = steps[t].v[v], in = written[t].v[v], sum = sums[t].v[v];
#pragma GCC unroll 2
                        for (int64_t k = 0; k < PAIR; k++) {
                            state.v[k][v] = exp2(step * rate.v[k][v]) * state.v[k][v] + in * write[t * PAIR + k];
                            sum += state.v[k][v] * read[t * PAIR + k];
                        }
                        sums[t].v[v] = sum;
                    }
                }
                slot = state;
            }
            for (int64_t t = 0; t < length; t++) put(y + (at + t) * size.channels() + first, sums[t], count);
        }
    }
}

template <class T>
void forward(const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d, const uint8_t* starts, T* y,
             float* kept, Sizes size, int threads) {
    int64_t blocks = size.blocks(), parts = size.batch * size.heads * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        Part own(part / blocks / size.heads, part / blocks % size.heads, part % blocks, size);
        forward_part(x, dt, a, b, c, d, starts, y, kept, own, size);
    }
}

// Sums of B's and C's gradients over a block of channels, one in each lane.
struct Shared {
    lanes write[PAIR], read[PAIR];
};

// One pair of rates of one tile through one segment, forwards: its states and decays, and what C's gradient gets of them.
inline void again(Pair* states, Pair* decays, Shared* shared, const Row* steps, const Row* written, const Row* dy, const Pair& rate,
                  const float* write, const uint8_t* start, int64_t length) {
    Pair state = states[0];
    for (int64_t t = 0; t < length; t++) {
        if (start != nullptr && start[t]) state = Pair{};
        lanes read[PAIR];
#pragma GCC unroll 2
        for (int64_t k = 0; k < PAIR; k++) read[k] = shared[t].read[k];
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; v++) {
            lanes step = steps[t].v[v], in = written[t].v[v], given = dy[t].v[v];
#pragma GCC unroll 2
            for (int64_t k = 0; k < PAIR; k++) {
                lanes decay = exp2(step * rate.v[k][v]);
                decays[t].v[k][v] = decay;
                state.v[k][v] = decay * state.v[k][v] + in * write[t * PAIR + k];
                states[t + 1].v[k][v] = state.v[k][v];
                read[k] += given * state.v[k][v];
            }
        }
#pragma GCC unroll 2
        for (int64_t k = 0; k < PAIR; k++) shared[t].read[k] = read[k];
    }
}

// The same backwards. later: what the state after a position gets from those that follow; dwritten and dsteps: sums over rates,
// dsteps of what is decayed by times log2(e).
inline void back(const Pair* states, const Pair* decays, Shared* shared, const Row* steps, const Row* written, const Row* dy,
                 Row* dwritten, Row* dsteps, const Pair& rate, Pair& drate, Pair& later, const float* write, const float* read,
                 const uint8_t* start, int64_t length) {
    Pair after = later, total = drate;
    for (int64_t t = length - 1; t >= 0; t--) {
        bool starts = start != nullptr && start[t];
        lanes wrote[PAIR];
#pragma GCC unroll 2
        for (int64_t k = 0; k < PAIR; k++) wrote[k] = shared[t].write[k];
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; v++) {
            lanes step = steps[t].v[v], in = written[t].v[v], given = dy[t].v[v], din = dwritten[t].v[v], dstep = dsteps[t].v[v];
#pragma GCC unroll 2
            for (int64_t k = 0; k < PAIR; k++) {
                lanes dstate = after.v[k][v] + given * read[t * PAIR + k];
                wrote[k] += in * dstate;
                din += dstate * write[t * PAIR + k];
                after.v[k][v] = decays[t].v[k][v] * dstate;
                lanes dlog = after.v[k][v] * states[t].v[k][v];
                if (starts) dlog = lanes{};
                dstep += dlog * rate.v[k][v];
                total.v[k][v] += dlog * step;
            }
            dwritten[t].v[v] = din;
            dsteps[t].v[v] = dstep;
        }
        if (starts) after = Pair{};
#pragma GCC unroll 2
        for (int64_t k = 0; k < PAIR; k++) shared[t].write[k] = wrote[k];
    }
    later = after, drate = total;
}

// da (B, I, N) and dd (B, I): each sequence's own. db and dc (B, H, blocks, T, N): each block's own.
template <class T>
void backward_part(const T* dy, const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d,
                   const uint8_t* starts, float* kept, T* dx, float* ddt, float* da, float* db, float* dc, float* dd, Part part,
                   Sizes size) {
    int64_t pairs = size.pairs();
    std::vector<Pair> rates = rates_of(a, part, size), drates(part.tiles * pairs, Pair{}), later(part.tiles * pairs, Pair{});
    std::vector<Pair> states(size.segment + 1), decays(size.segment);
    std::vector<Row> in(size.segment), steps(size.segment), written(size.segment), given(size.segment);
    std::vector<Row> dwritten(size.segment), dsteps(size.segment), dskip(part.tiles, Row{});
    std::vector<float> writes(pairs * size.segment * PAIR), reads(writes.size());
    std::vector<Shared> shared(pairs * size.segment);
    for (int64_t segment = size.segments() - 1; segment >= 0; segment--) {
        int64_t begin = segment * size.segment, length = std::min(size.segment, size.length - begin);
        int64_t at = part.sequence * size.length + begin;
        const uint8_t* start = starts == nullptr ? nullptr : starts + at;
        fetch_pairs(writes.data(), b + part.sequence * size.b_sequence + begin * size.b_row + part.head * size.b_head, size.b_row,
                    length, size);
        fetch_pairs(reads.data(), c + part.sequence * size.c_sequence + begin * size.c_row + part.head * size.c_head, size.c_row,
                    length, size);
        std::fill(shared.begin(), shared.end(), Shared{});
        for (int64_t tile = 0; tile < part.tiles; tile++) {
            int64_t count = part.tile_count(tile), first = part.first + tile * TILE;
            Row skip;
            fetch(skip, d + first, count);
            for (int64_t t = 0; t < length; t++) {
                int64_t row = (at + t) * size.channels() + first;
                fetch(in[t], x + row, count);
                fetch(steps[t], dt + row, count);
                fetch(given[t], dy + row, count);
                for (int64_t v = 0; v < VECTORS; v++) {
                    written[t].v[v] = in[t].v[v] * steps[t].v[v];
                    dskip[tile].v[v] += in[t].v[v] * given[t].v[v];
                }
                dwritten[t] = dsteps[t] = Row{};
            }
            for (int64_t pair = 0; pair < pairs; pair++) {
                const float *write = writes.data() + pair * size.segment * PAIR, *read = reads.data() + pair * size.segment * PAIR;
                Shared* own = shared.data() + pair * size.segment;
                const Pair& rate = rates[tile * pairs + pair];
                states[0] = recalled(kept, segment, pair, part, tile, size);
                again(states.data(), decays.data(), own, steps.data(), written.data(), given.data(), rate, write, start, length);
                back(states.data(), decays.data(), own, steps.data(), written.data(), given.data(), dwritten.data(), dsteps.data(),
                     rate, drates[tile * pairs + pair], later[tile * pairs + pair], write, read, start, length);
            }
            for (int64_t t = 0; t < length; t++) {
                int64_t row = (at + t) * size.channels() + first;
                for (int64_t v = 0; v < VECTORS; v++) {
                    lanes dwrite = dwritten[t].v[v];
                    dwritten[t].v[v] = dwrite * steps[t].v[v] + given[t].v[v] * skip.v[v];
                    dsteps[t].v[v] = dwrite * in[t].v[v] + dsteps[t].v[v] * (1.0f / LOG2_E);
                }
                put(dx + row, dwritten[t], count);
                put(ddt + row, dsteps[t], count);
            }
        }
        int64_t own = ((part.sequence * size.heads + part.head) * size.blocks() + part.block) * size.length + begin;
        for (int64_t t = 0; t < length; t++) {
            for (int64_t n = 0; n < size.state; n++) {
                const Shared& sums = shared[n / PAIR * size.segment + t];
                db[(own + t) * size.state + n] = sum_of(sums.write[n % PAIR]);
                dc[(own + t) * size.state + n] = sum_of(sums.read[n % PAIR]);
            }
        }
    }
    for (int64_t i = 0; i < part.count; i++) {
        int64_t channel = part.sequence * size.channels() + part.first + i, tile = i / TILE;
        dd[channel] = dskip[tile].v[i % TILE / LANES][i % LANES];
        for (int64_t n = 0; n < size.state; n++)
            da[channel * size.state + n] = drates[tile * pairs + n / PAIR].v[n % PAIR][i % TILE / LANES][i % LANES];
    }
}

// to (B, T, H, N): the sums of (B, H, blocks, T, N) over blocks.
template <class T>
void add_blocks(T* to, const float* from, Sizes size, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t t = 0; t < size.length; t++) {
            for (int64_t h = 0; h < size.heads; h++) {
                for (int64_t n = 0; n < size.state; n++) {
                    float sum = 0.0f;
                    for (int64_t block = 0; block < size.blocks(); block++)
                        sum += from[(((b * size.heads + h) * size.blocks() + block) * size.length + t) * size.state + n];
                    to[((b * size.length + t) * size.heads + h) * size.state + n] = stored<T>(sum);
                }
            }
        }
    }
}

// dx, ddt (B, T, I); da (B, I, N) and dd (B, I): each sequence's own; db, dc (B, T, H, N).
template <class T>
void backward(const T* dy, const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d,
              const uint8_t* starts, float* kept, T* dx, float* ddt, float* da, T* db, T* dc, float* dd, Sizes size, int threads) {
    int64_t blocks = size.blocks(), parts = size.batch * size.heads * blocks;
    // Not a vector: it would be filled with zeros first.
    std::unique_ptr<float[]> db_blocks(new float[parts * size.length * size.state]);
    std::unique_ptr<float[]> dc_blocks(new float[parts * size.length * size.state]);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        Part own(part / blocks / size.heads, part / blocks % size.heads, part % blocks, size);
        backward_part(dy, x, dt, a, b, c, d, starts, kept, dx, ddt, da, db_blocks.get(), dc_blocks.get(), dd, own, size);
    }
    add_blocks(db, db_blocks.get(), size, threads);
    add_blocks(dc, dc_blocks.get(), size, threads);
}

}  // namespace

#define SIZES                                                                                                                   \
    int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t state, int64_t b_sequence, int64_t b_row,              \
        int64_t b_head, int64_t c_sequence, int64_t c_row, int64_t c_head, int64_t segment, int64_t threads
#define GIVEN                                                                                                                   \
    { batch, length, heads, width, state, b_sequence, b_row, b_head, c_sequence, c_row, c_head, segment }
#define EXPORT(T, NAME)                                                                                                         \
    extern "C" void forward_##NAME(const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d,         \
                                   const uint8_t* starts, T* y, float* kept, SIZES) {                                           \
        forward(x, dt, a, b, c, d, starts, y, kept, GIVEN, threads);                                                            \
    }                                                                                                                           \
    extern "C" void backward_##NAME(const T* dy, const T* x, const float* dt, const float* a, const T* b, const T* c,           \
                                    const float* d, const uint8_t* starts, float* kept, T* dx, float* ddt, float* da, T* db,    \
                                    T* dc, float* dd, SIZES) {                                                                  \
        backward(dy, x, dt, a, b, c, d, starts, kept, dx, ddt, da, db, dc, dd, GIVEN, threads);                                 \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
