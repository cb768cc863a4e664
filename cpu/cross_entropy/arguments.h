// What cross_entropy.cpp's C interface is told; ops/cross_entropy/cpu.py mirrors it field by field.
#pragma once
#include <cstdint>

struct CrossEntropyArguments {
    void* logits;            // (rows, vocabulary), float or bfloat16
    const int64_t* targets;  // (rows)
    float* losses;           // (rows)
    int64_t rows, vocabulary;
    float scale, pull;
    int gradient;  // whether the gradient takes the logits' place
    int bfloat16, threads;
};
