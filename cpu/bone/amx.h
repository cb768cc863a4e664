// The two products of Bone's kernels in bfloat16 on AMX, the matrix unit of recent Xeons; see plain.h for what
// they compute. Sums are float.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds to a 16 x 16 tile of floats the product of a 16 x 32
// and a 32 x 16 tile of bfloat16, the latter paired (pairs.h).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "bone/pairs.h"

namespace {

// to (columns, rows) = the transpose of 32 rows by 32 columns of from, or of as many as there are; strides in elements.
INLINE void transpose_block(Bfloat16* to, int64_t to_row, const Bfloat16* from, int64_t from_row, int64_t rows,
                            int64_t columns) {
    alignas(64) Bfloat16 pairs[32 * 32], whole[32 * 32];
    const bool full = rows == 32 && columns == 32;
    if (!full) {
        memset(whole, 0, sizeof whole);
        for (int64_t t = 0; t < rows; t++) memcpy(whole + t * 32, from + t * from_row, columns * sizeof(Bfloat16));
        from = whole, from_row = 32;
    }
    for (int64_t t = 0; t < 32; t += 2)
        pair_rows(pairs + t * 32, load_words(from + t * from_row), load_words(from + (t + 1) * from_row));
    Bfloat16* out = full ? to : whole;
    const int64_t bytes = full ? 2 * to_row : 64;
    for (int64_t c = 0; c < 32; c += 16)
        transpose_words(reinterpret_cast<char*>(out) + c * bytes, bytes, reinterpret_cast<const char*>(pairs) + 4 * c,
                        128);
    for (int64_t c = 0; c < (full ? 0 : columns); c++) memcpy(to + c * to_row, whole + c * 32, rows * sizeof(Bfloat16));
}

struct Amx {
    using Operand = Bfloat16;
    static constexpr int64_t kTile = 128;

    static int64_t width(int64_t rank) { return Pairs::width(rank); }
    static int64_t packed_size(int64_t rank) { return Pairs::packed_size(rank); }
    static constexpr auto pack = Pairs::pack, pack_transposed = Pairs::pack_transposed;

    static bool reads_in_place(int64_t, int64_t) { return false; }  // `rows` reads 32 rows at a time, to kTile

    // The registers belong to the thread, and are given back at the end.
    explicit Amx(int64_t rank)
        : rank_(rank), width_(width(rank)), out_(kEdge * width_), paired_(kTile * width_), turned_(kTile * width_) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Amx() { _tile_release(); }
    Amx(const Amx&) = delete;

    template <class Take>
    void rows(Rows<const Bfloat16> left, const Bfloat16* packed, int64_t count, const Take& take) {
        for (int64_t t = 0; t < count; t += kEdge) {
            multiply<false>(out_.data(), left[t], width_, packed, kEdge);
            for (int64_t m = 0; m < std::min(kEdge, count - t); m++)
                for (int64_t c = 0; c < rank_; c += kLanes) take(t + m, c, load(out_.data() + m * width_ + c));
        }
    }
    void outer(float* sum, Rows<const Bfloat16> left, Rows<const Bfloat16> right, int64_t count) {
        const int64_t padded = round_up(count, kEdge);
        pair(paired_.data(), left, count, width_, padded);
        transpose(turned_.data(), paired_.data(), padded / 2, width_);  // (width, padded)
        pair(paired_.data(), right, count, width_, padded);
        multiply<true>(sum, turned_.data(), padded, paired_.data(), width_);
    }

  private:
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

    int64_t rank_, width_;
    Scratch<float> out_;
    Scratch<Bfloat16> paired_, turned_;
};

}  // namespace
