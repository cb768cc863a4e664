// The arguments of cross_entropy.cpp's C interface; ops/cross_entropy.py mirrors them field by field.
#pragma once
#include <cstdint>

struct CrossEntropyArguments {
    void* logits;            // (rows, vocabulary), float or bfloat16
    const int64_t* targets;  // (rows)
    float* losses;           // (rows)
    int64_t rows, vocabulary;
    float scale, pull;
    int gradient;  // true: the gradient overwrites the logits
    int bfloat16, threads;
};
