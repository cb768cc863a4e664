// Pairs of bfloat16 as processors multiply them, and the two products of Bone's kernels (see plain.h for what they
// compute) with AVX-512's instruction for them. Sums are float.
//
// A word holds two numbers that follow each other along the sum: that of rows 2p and 2p + 1 of a column in a "paired"
// matrix, whose rows are half as many. One instruction adds to each of 16 floats the two products of a pair.
#pragma once
#include "bone/plain.h"

namespace {

constexpr int64_t kEdge = 32;  // sizes are padded to it: two tile registers either way

typedef __m512i Words;  // 16 words, each a pair of bfloat16

INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store_words(void* p, Words x) { _mm512_storeu_si512(p, x); }

// 16 x 16 words, rows `from_row` bytes apart, are written transposed, rows `to_row` bytes apart.
INLINE void transpose_words(char* to, int64_t to_row, const char* from, int64_t from_row) {
    Words a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = load_words(from + i * from_row);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {  // a[i + c] holds column 4 l + c of rows i to i + 3 in its quarter l
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        const Words low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        const Words high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const Words low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const Words high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        store_words(to + c * to_row, _mm512_shuffle_i32x4(low01, low23, 0x88));
        store_words(to + (4 + c) * to_row, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        store_words(to + (8 + c) * to_row, _mm512_shuffle_i32x4(high01, high23, 0x88));
        store_words(to + (12 + c) * to_row, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Two rows of 32 bfloat16, one after the other in words.
INLINE void pair_rows(Bfloat16* to, Words even, Words odd) {
    const Words first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const Words second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const Words low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    store_words(to, _mm512_permutex2var_epi64(low, first, high));
    store_words(to + 32, _mm512_permutex2var_epi64(low, second, high));
}

// rows (count, width), and zeros up to `padded` rows -> (padded / 2, width) words.
INLINE void pair(Bfloat16* to, Rows<const Bfloat16> rows, int64_t count, int64_t width, int64_t padded) {
    for (int64_t t = 0; t < padded; t += 2)
        for (int64_t c = 0; c < width; c += 32)
            pair_rows(to + t * width + 2 * c, t < count ? load_words(rows[t] + c) : Words{},
                      t + 1 < count ? load_words(rows[t + 1] + c) : Words{});
}

// (rows, columns) words -> (columns, rows) words; both are multiples of 16.
INLINE void transpose(Bfloat16* to, const Bfloat16* from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16)
            transpose_words(reinterpret_cast<char*>(to) + 4 * (j * rows + i), 4 * rows,
                            reinterpret_cast<const char*>(from) + 4 * (i * columns + j), 4 * columns);
}

// The words that products.h multiplies in place of floats.
struct PairWords {
    typedef uint32_t Word __attribute__((aligned(2), may_alias));
    using Vector = Words;
    static INLINE Vector load(const Word* p) { return load_words(p); }
    static INLINE Vector broadcast(Word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static INLINE Vec add_product(Vec sum, Vector a, Vector b) {
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)a, (__m512bh)b));
    }
};

struct Pairs {
    using Operand = Bfloat16;
    static constexpr int64_t kTile = 64;

    static int64_t width(int64_t rank) { return round_up(rank, kEdge); }
    static int64_t packed_size(int64_t rank) { return width(rank) * width(rank); }

    static bool reads_in_place(int64_t rank, int64_t stride) { return rank % kEdge == 0 && stride % 2 == 0; }

    explicit Pairs(int64_t rank) : rank_(rank), width_(width(rank)), left_(kTile * width_), right_(kTile * width_) {}

    static void pack(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        Scratch<Bfloat16> padded(packed_size(rank));
        pad(padded.data(), matrix, rank);
        const int64_t size = width(rank);
        pair(to, {padded.data(), size}, size, size, size);
    }
    static void pack_transposed(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        Scratch<Bfloat16> padded(packed_size(rank));
        pad(padded.data(), matrix, rank);
        transpose(to, padded.data(), width(rank), width(rank) / 2);  // pairs along k lie in its rows already
    }

    template <class Take>
    void rows(Rows<const Bfloat16> left, const Bfloat16* packed, int64_t count, const Take& take) {
        const int64_t pairs = width_ / 2;
        const Product<PairWords> product{nullptr, 0, words(left.data), left.stride / 2, words(packed), width_, pairs,
                                         round_up(rank_, kLanes)};
        multiply<Kind<false, false>, kRows>(product, count, take);
    }
    void outer(float* sum, Rows<const Bfloat16> left, Rows<const Bfloat16> right, int64_t count) {
        const int64_t even = round_up(count, 2);
        pair(left_.data(), left, count, width_, even);
        pair(right_.data(), right, count, width_, even);
        const Word *lefts = words(left_.data()), *rights = words(right_.data());
        const Product<PairWords> product{sum, width_, lefts, width_, rights, width_, even / 2, width_};
        multiply<Kind<true, true>, kRows>(product, width_);
    }

  private:
    using Word = PairWords::Word;
    static const Word* words(const Bfloat16* pairs) { return reinterpret_cast<const Word*>(pairs); }
    static void pad(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        memset(to, 0, packed_size(rank) * sizeof(Bfloat16));
        for (int64_t i = 0; i < rank; i++) memcpy(to + i * width(rank), matrix + i * rank, rank * sizeof(Bfloat16));
    }

    int64_t rank_, width_;
    Scratch<Bfloat16> left_, right_;
};

}  // namespace
