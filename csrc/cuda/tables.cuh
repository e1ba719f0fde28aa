// Gradients of the tables, float32, with no atomics: every sum is formed by one thread or one block, in the order of
// the rows. With g the gradient of x' and coefficients(a) = a V_t:
//
//     grad_mean[t] += sum of g over the rows with target t
//     grad_mean[s] -= V_t (sum of coefficients(g) over the rows from s to t), over all t
//     grad_basis[t] = sum over the rows of g coefficients(x - mean_s)ᵀ + (x - mean_s) coefficients(g)ᵀ
//
// The sums by pair of languages take languages x languages x rank floats; nothing else grows with more than the tables.
#pragma once

#include "project.cuh"

namespace shifcon {

struct TableArguments {
    Groups groups;  // rows by target, within a target by source where means are asked for
    Ids ids;
    Rows upper;  // g
    Rows x;      // only for the basis
    const float* mean;
    const void* basis;  // in the dtype of g
    int hidden, rank;
    Coefficients of_upper, of_x;
    float* pair_sums;   // (languages of target, languages of source, padded)
    float* grad_mean;   // (languages, hidden)
    float* grad_basis;  // (languages, hidden, rank)
};

void mean_gradient(Element element, const TableArguments& arguments, void* stream);
void basis_gradient(Element element, const TableArguments& arguments, void* stream);

}  // namespace shifcon
