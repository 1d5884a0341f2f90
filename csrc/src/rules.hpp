// The optimizers' arithmetic, operation for operation src/overspill/spec/update_rule.py: of one element or of a vector of them
// (`*_element`, for the loops of fused.hpp), and of staged arrays. Included by kernels.cpp only; see numbers.hpp for why
// everything here is internal.
//
// p, g, m, v are parameter (or master), gradient, first and second moment; p, m and v are updated in place. A rule leaves the
// moments that it does not keep alone.
#pragma once

#include "lanes.hpp"
#include "numbers.hpp"
#include "overspill/update.hpp"

namespace overspill {
namespace {

template <Rule rule>
constexpr int kNumMoments = rule == Rule::adamw ? 2
                            : rule == Rule::sgd ? 0
                                                : 1;

// Value is float or Floats; rule 3 of update.hpp, canonical NaNs, is left to the caller.
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

template <Rule rule, class Value>
inline void sgd_element(Value& p, Value g, Value& m, const UpdateScalars& s) {
  const Value direction = g * s.gradient_scale + p * s.weight_decay;
  if constexpr (rule == Rule::sgd) {
    p = p - s.step_size * direction;
  } else {
    const Value momentum = m * s.momentum + direction;
    const Value step = rule == Rule::sgd_nesterov ? direction + momentum * s.momentum : momentum;
    p = p - s.step_size * step;
    m = momentum;
  }
}

template <class Value>
inline void lion_element(Value& p, Value g, Value& m, const UpdateScalars& s) {
  const Value gradient = g * s.gradient_scale, up = filled<Value>(s.step_size), down = -up;
  const Value mix = m * s.beta1 + gradient * s.one_minus_beta1;
  const Value below = mix < 0 ? down : mix;  // a zero or a NaN moves p by itself
  p = p * s.decay - (mix > 0 ? up : below);
  m = m * s.beta2 + gradient * s.one_minus_beta2;
}

template <Rule rule, class Value>
inline void rule_element(Value& p, Value g, Value& m, Value& v, const UpdateScalars& s) {
  if constexpr (rule == Rule::adamw) {
    adamw_element(p, g, m, v, s);
  } else if constexpr (rule == Rule::lion) {
    lion_element(p, g, m, s);
  } else {
    sgd_element<rule>(p, g, m, s);
  }
}

template <Rule rule>
void apply_rule(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, const UpdateScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float first = kNumMoments<rule> > 0 ? m[i] : 0, second = kNumMoments<rule> > 1 ? v[i] : 0;
    rule_element<rule>(p[i], g[i], first, second, s);
    p[i] = canonical(p[i]);
    if constexpr (kNumMoments<rule> > 0) m[i] = canonical(first);
    if constexpr (kNumMoments<rule> > 1) v[i] = canonical(second);
  }
}

}  // namespace
}  // namespace overspill
