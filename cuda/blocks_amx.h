// The two products of the block kernels in bfloat16 on AMX, the matrix unit of recent Xeons; see blocks_plain.h for what
// they compute. Sums are float.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds to a 16 x 16 tile of floats the product of a 16 x 32 and
// a 32 x 16 tile of bfloat16, the latter with each pair of rows interleaved ("paired": a word holds rows 2p and 2p + 1 of a
// column).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "blocks_vector.h"

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
        const Words low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const Words low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const Words high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        store_words(to + c * to_row, _mm512_shuffle_i32x4(low01, low23, 0x88));
        store_words(to + (4 + c) * to_row, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        store_words(to + (8 + c) * to_row, _mm512_shuffle_i32x4(high01, high23, 0x88));
        store_words(to + (12 + c) * to_row, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Two rows of 32 bfloat16, one after the other in words.
INLINE void pair_rows(Bfloat16* to, const Bfloat16* even, const Bfloat16* odd) {
    const Words first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const Words low = _mm512_unpacklo_epi16(load_words(even), load_words(odd));
    const Words high = _mm512_unpackhi_epi16(load_words(even), load_words(odd));
    store_words(to, _mm512_permutex2var_epi64(low, first, high));
    store_words(to + 32, _mm512_permutex2var_epi64(low, second, high));
}

// rows (count, width) -> (count / 2, width) words.
INLINE void pair(Bfloat16* to, const Bfloat16* rows, int64_t count, int64_t width) {
    for (int64_t t = 0; t < count; t += 2)
        for (int64_t c = 0; c < width; c += 32) pair_rows(to + t * width + 2 * c, rows + t * width + c, rows + (t + 1) * width + c);
}

// (rows, columns) words -> (columns, rows) words; both are multiples of 16.
INLINE void transpose(Bfloat16* to, const Bfloat16* from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16)
            transpose_words(reinterpret_cast<char*>(to) + 4 * (j * rows + i), 4 * rows,
                            reinterpret_cast<const char*>(from) + 4 * (i * columns + j), 4 * columns);
}

// to (columns, rows) = the transpose of 32 rows by 32 columns of from, or of as many as there are; strides in elements.
INLINE void transpose_block(Bfloat16* to, int64_t to_row, const Bfloat16* from, int64_t from_row, int64_t rows, int64_t columns) {
    alignas(64) Bfloat16 pairs[32 * 32], whole[32 * 32];
    const bool full = rows == 32 && columns == 32;
    if (!full) {
        memset(whole, 0, sizeof whole);
        for (int64_t t = 0; t < rows; t++) memcpy(whole + t * 32, from + t * from_row, columns * sizeof(Bfloat16));
        from = whole, from_row = 32;
    }
    for (int64_t t = 0; t < 32; t += 2) pair_rows(pairs + t * 32, from + t * from_row, from + (t + 1) * from_row);
    Bfloat16* out = full ? to : whole;
    const int64_t bytes = full ? 2 * to_row : 64;
    for (int64_t c = 0; c < 32; c += 16)
        transpose_words(reinterpret_cast<char*>(out) + c * bytes, bytes, reinterpret_cast<const char*>(pairs) + 4 * c, 128);
    for (int64_t c = 0; c < (full ? 0 : columns); c++) memcpy(to + c * to_row, whole + c * 32, rows * sizeof(Bfloat16));
}

struct Amx {
    using Operand = Bfloat16;
    static constexpr int64_t kTile = 128;

    static int64_t width(int64_t rank) { return round_up(rank, kEdge); }
    static int64_t packed_size(int64_t rank) { return width(rank) * width(rank); }

    // The registers belong to the thread, and are given back at the end.
    explicit Amx(int64_t rank) : width_(width(rank)), paired_(kTile * width_), turned_(kTile * width_) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Amx() { _tile_release(); }
    Amx(const Amx&) = delete;

    static void pack(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        Scratch<Bfloat16> padded(packed_size(rank));
        pad(padded.data(), matrix, rank);
        pair(to, padded.data(), width(rank), width(rank));
    }
    static void pack_transposed(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        Scratch<Bfloat16> padded(packed_size(rank));
        pad(padded.data(), matrix, rank);
        transpose(to, padded.data(), width(rank), width(rank) / 2);  // pairs along k lie in its rows already
    }

    template <class Finish>
    void rows(float* out, const Bfloat16* left, const Bfloat16* packed, int64_t count, const Finish& finish) {
        for (int64_t t = 0; t < count; t += kEdge) {
            multiply<false>(out + t * width_, left + t * width_, width_, packed, kEdge);
            finish(t, t + kEdge < count ? t + kEdge : count);
        }
    }
    void outer(float* sum, const Bfloat16* left, const Bfloat16* right, int64_t count) {
        const int64_t padded = round_up(count, kEdge);
        pair(paired_.data(), left, padded, width_);
        transpose(turned_.data(), paired_.data(), padded / 2, width_);  // (width, padded)
        pair(paired_.data(), right, padded, width_);
        multiply<true>(sum, turned_.data(), padded, paired_.data(), width_);
    }

  private:
    static void pad(Bfloat16* to, const Bfloat16* matrix, int64_t rank) {
        memset(to, 0, packed_size(rank) * sizeof(Bfloat16));
        for (int64_t i = 0; i < rank; i++) memcpy(to + i * width(rank), matrix + i * rank, rank * sizeof(Bfloat16));
    }

    // out (rows, width) (+)= left (rows, K) right (K, width), right paired; all are multiples of kEdge.
    template <bool kAdd>
    void multiply(float* out, const Bfloat16* left, int64_t K, const Bfloat16* right, int64_t rows) {
        const int64_t out_bytes = 4 * width_, left_bytes = 2 * K, right_bytes = 4 * width_;
        for (int64_t n = 0; n < width_; n += kEdge)
            for (int64_t m = 0; m < rows; m += kEdge) {
                float *top = out + m * width_ + n, *bottom = top + 16 * width_;
                if (kAdd) {
                    _tile_loadd(0, top, out_bytes);
                    _tile_loadd(1, top + 16, out_bytes);
                    _tile_loadd(2, bottom, out_bytes);
                    _tile_loadd(3, bottom + 16, out_bytes);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int64_t k = 0; k < K; k += 32) {
                    const Bfloat16 *a = left + m * K + k, *b = right + k * width_ + 2 * n;
                    _tile_loadd(4, a, left_bytes);
                    _tile_loadd(5, a + 16 * K, left_bytes);
                    _tile_loadd(6, b, right_bytes);
                    _tile_loadd(7, b + 32, right_bytes);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, top, out_bytes);
                _tile_stored(1, top + 16, out_bytes);
                _tile_stored(2, bottom, out_bytes);
                _tile_stored(3, bottom + 16, out_bytes);
            }
    }

    int64_t width_;
    Scratch<Bfloat16> paired_, turned_;
};

}  // namespace
