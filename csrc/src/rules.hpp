// The optimizers' arithmetic on staged fp32 values, operation for operation src/overspill/spec/update_rule.py. Included by
// kernels.cpp only; see numbers.hpp for why everything here is internal.
//
// p, g, m, v are n values each: parameter (or master), gradient, first and second moment; p, m and v are updated in place.
#pragma once

#include "numbers.hpp"
#include "overspill/update.hpp"

namespace overspill {
namespace {

// Value is float or a vector of floats (lanes.hpp); rule 3 of update.hpp, canonical NaNs, is left to the caller.
template <class Value>
inline void adamw_element(Value& p, Value g, Value& exp_avg, Value& exp_avg_sq, const UpdateScalars& s) {
  g = g * s.gradient_scale;
  const Value decayed = p * s.decay;
  const Value m = exp_avg + (g - exp_avg) * s.one_minus_beta1;
  const Value v = exp_avg_sq * s.beta2 + (g * s.one_minus_beta2) * g;
  const Value denom = root(v) * s.bias_correction2_factor + s.eps;
  p = decayed - (s.step_size * m) / denom;
  exp_avg = m;
  exp_avg_sq = v;
}

void adamw(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, const UpdateScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    adamw_element(p[i], g[i], m[i], v[i], s);
    p[i] = canonical(p[i]);
    m[i] = canonical(m[i]);
    v[i] = canonical(v[i]);
  }
}

void sgd(float* __restrict p, const float* __restrict g, const UpdateScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const float direction = g[i] * s.gradient_scale + p[i] * s.weight_decay;
    p[i] = canonical(p[i] - s.step_size * direction);
  }
}

template <bool nesterov>
void sgd_momentum(float* __restrict p, const float* __restrict g, float* __restrict m, const UpdateScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const float direction = g[i] * s.gradient_scale + p[i] * s.weight_decay;
    const float momentum = m[i] * s.momentum + direction;
    const float step = nesterov ? direction + momentum * s.momentum : momentum;
    p[i] = canonical(p[i] - s.step_size * step);
    m[i] = canonical(momentum);
  }
}

void lion(float* __restrict p, const float* __restrict g, float* __restrict m, const UpdateScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const float gradient = g[i] * s.gradient_scale;
    const float mix = m[i] * s.beta1 + gradient * s.one_minus_beta1;
    const float below = mix < 0 ? -s.step_size : mix;  // a zero or a NaN moves p by itself
    const float step = mix > 0 ? s.step_size : below;
    p[i] = canonical(p[i] * s.decay - step);
    m[i] = canonical(m[i] * s.beta2 + gradient * s.one_minus_beta2);
  }
}

}  // namespace
}  // namespace overspill
