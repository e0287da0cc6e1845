// Which experts serve which token: top-k, and Algorithm 1 of WDMoE as others re-implemented it. Knows nothing of Python.
// The NumPy twin (wdmoe/solver/reference/native.py) does the same operations in the same order: results are equal to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "wdmoe/checks.hpp"
#include "wdmoe/row_top_k.hpp"

namespace wdmoe {

struct PruneOptions {
    bool cosine;       // Algorithm 1; otherwise only experts that are not available are dropped
    bool renormalise;  // the kept weights of a token grow to the sum it had before
    bool wlr_sum;      // WLR of a token: sum over its kept experts instead of mean
    double theta, theta_step, gamma;
};

struct PruneResult {
    double wlr;    // mean over tokens, of what is kept, with the weights that are handed back
    double theta;  // threshold that was used last; 0 where the policy has none
};

namespace detail {

inline double sum_kept(const std::int32_t* experts, const double* weights, std::size_t k) {
    double sum = 0.0;
    for (std::size_t j = 0; j < k; ++j) sum += experts[j] >= 0 ? weights[j] : 0.0;
    return sum;
}

// Weight-to-latency ratio of one token; latency is indexed by expert.
inline double wlr_of_token(const std::int32_t* experts, const double* weights, std::size_t k, const double* latency,
                           bool as_sum) {
    double sum = 0.0;
    std::size_t kept = 0;
    for (std::size_t j = 0; j < k; ++j) {
        if (experts[j] < 0) continue;
        sum += weights[j] / latency[experts[j]];
        ++kept;
    }
    return as_sum || kept == 0 ? sum : sum / static_cast<double>(kept);
}

// Cosine between weights and latencies of the kept experts, at most 1. Above 1 (2) where it says nothing: fewer than
// two kept, or no weight at all; such a token is never pruned.
inline double cosine_of_token(const std::int32_t* experts, const double* weights, std::size_t k,
                              const double* latency) {
    double product = 0.0, weights_squared = 0.0, latencies_squared = 0.0;
    std::size_t kept = 0;
    for (std::size_t j = 0; j < k; ++j) {
        if (experts[j] < 0) continue;
        const double w = weights[j], t = latency[experts[j]];
        product += w * t;
        weights_squared += w * w;
        latencies_squared += t * t;
        ++kept;
    }
    if (kept < 2 || weights_squared == 0.0) return 2.0;
    return std::min(product / (std::sqrt(weights_squared) * std::sqrt(latencies_squared)), 1.0);
}

// Drops the marked experts of one token. Returns the share of its weight that stays.
template <typename Marked>
double drop(std::int32_t* experts, double* weights, std::size_t k, bool renormalise, Marked marked) {
    const double before = sum_kept(experts, weights, k);
    bool dropped = false;
    for (std::size_t j = 0; j < k; ++j) {
        if (experts[j] < 0 || !marked(j)) continue;
        experts[j] = -1;
        weights[j] = 0.0;
        dropped = true;
    }
    if (!dropped || before == 0.0) return 1.0;
    const double after = sum_kept(experts, weights, k);
    if (renormalise && after > 0.0) {
        for (std::size_t j = 0; j < k; ++j) weights[j] = weights[j] / after * before;
    }
    return after / before;
}

// Position of the lightest kept expert, the later one of equals.
inline std::size_t lightest(const std::int32_t* experts, const double* weights, std::size_t k) {
    std::size_t found = k;
    for (std::size_t j = 0; j < k; ++j) {
        if (experts[j] >= 0 && (found == k || weights[j] <= weights[found])) found = j;
    }
    return found;
}

}  // namespace detail

// gate (tokens, n_experts), available (n_experts,) or null -> experts, weights (tokens, k).
// normalise: the weights of a token sum to 1 (a token without weight keeps zeros).
// Returns the index of the first gate value that is not usable, or tokens * n_experts where all are.
inline std::size_t top_k(const double* gate, std::size_t tokens, std::size_t n_experts, std::size_t k,
                         const std::uint8_t* available, bool normalise, std::int32_t* experts, double* weights) {
    detail::RowTopK largest(n_experts);
    for (std::size_t t = 0; t < tokens; ++t) {
        const double* row = gate + t * n_experts;
        const std::size_t bad = first_outside(row, n_experts, 0.0);
        if (bad < n_experts) return t * n_experts + bad;
        largest.run(row, k, available, experts + t * k, weights + t * k);
        if (!normalise) continue;
        const double sum = detail::sum_kept(experts + t * k, weights + t * k, k);
        for (std::size_t j = 0; j < k && sum > 0.0; ++j) weights[t * k + j] /= sum;
    }
    return tokens * n_experts;
}

// One token's way through Algorithm 1: drop its lightest expert where the cosine is at most theta; theta rises from
// its start by theta_step up to 1 until the mean WLR exceeds gamma times what it was without any drop.
class CosinePruning {
public:
    CosinePruning(std::int32_t* experts, double* weights, std::size_t tokens, std::size_t k, const double* latency,
                  std::size_t latency_stride, const PruneOptions& options)
        : experts_(experts), weights_(weights), tokens_(tokens), k_(k), options_(options), cosine_(tokens),
          wlr_(tokens), wlr_dropped_(tokens) {
        std::vector<std::int32_t> trial_experts(k);
        std::vector<double> trial_weights(k);
        for (std::size_t t = 0; t < tokens; ++t) {
            const double* mine = latency + t * latency_stride;
            cosine_[t] = detail::cosine_of_token(experts_at(t), weights_at(t), k, mine);
            wlr_[t] = detail::wlr_of_token(experts_at(t), weights_at(t), k, mine, options.wlr_sum);
            if (cosine_[t] > 1.0) continue;
            std::copy_n(experts_at(t), k, trial_experts.data());
            std::copy_n(weights_at(t), k, trial_weights.data());
            drop_lightest(trial_experts.data(), trial_weights.data());
            wlr_dropped_[t] =
                detail::wlr_of_token(trial_experts.data(), trial_weights.data(), k, mine, options.wlr_sum);
        }
    }

    // Applies the drops; `kept_share` (tokens,) is multiplied by the share of weight that stays.
    PruneResult run(double* kept_share) {
        const double start = mean_wlr(-1.0);
        double theta = options_.theta, now = mean_wlr(theta);
        for (std::size_t step = 1; theta < 1.0 && !(now > options_.gamma * start); ++step) {
            theta = std::min(options_.theta + static_cast<double>(step) * options_.theta_step, 1.0);
            now = mean_wlr(theta);
        }
        for (std::size_t t = 0; t < tokens_; ++t) {
            if (cosine_[t] <= theta) kept_share[t] *= drop_lightest(experts_at(t), weights_at(t));
        }
        return {now, theta};
    }

private:
    std::int32_t* experts_;
    double* weights_;
    std::size_t tokens_, k_;
    PruneOptions options_;
    std::vector<double> cosine_, wlr_, wlr_dropped_;

    std::int32_t* experts_at(std::size_t t) { return experts_ + t * k_; }
    double* weights_at(std::size_t t) { return weights_ + t * k_; }

    double drop_lightest(std::int32_t* experts, double* weights) {
        const std::size_t light = detail::lightest(experts, weights, k_);
        return detail::drop(experts, weights, k_, options_.renormalise, [=](std::size_t j) { return j == light; });
    }

    double mean_wlr(double theta) const {
        double sum = 0.0;
        for (std::size_t t = 0; t < tokens_; ++t) sum += cosine_[t] <= theta ? wlr_dropped_[t] : wlr_[t];
        return tokens_ == 0 ? 0.0 : sum / static_cast<double>(tokens_);
    }
};

// Throws std::invalid_argument where an expert is not one of -1, 0 ... n_experts - 1, or a weight is not usable.
inline void check_assignment(const std::int32_t* experts, const double* weights, std::size_t n,
                             std::size_t n_experts) {
    for (std::size_t i = 0; i < n; ++i) {
        if (experts[i] < -1 || experts[i] >= static_cast<std::int64_t>(n_experts)) {
            throw std::invalid_argument("experts holds " + std::to_string(experts[i]) + ", need -1 (dropped) to " +
                                        std::to_string(static_cast<std::int64_t>(n_experts) - 1));
        }
    }
    if (first_outside(weights, n, 0.0) < n) throw std::invalid_argument("weights must be finite and not negative");
}

// Drops in place what is not kept (tokens, k); dropped_weight (tokens,) is written. Returns the weight that is kept,
// before any renormalising.
inline double keep_marked(std::int32_t* experts, double* weights, std::size_t tokens, std::size_t k,
                          const std::uint8_t* kept, bool renormalise, double* dropped_weight) {
    double total = 0.0;
    for (std::size_t t = 0; t < tokens; ++t) {
        const std::uint8_t* mine = kept + t * k;
        for (std::size_t j = 0; j < k; ++j) total += mine[j] != 0 ? weights[t * k + j] : 0.0;
        dropped_weight[t] = 1.0 - detail::drop(experts + t * k, weights + t * k, k, renormalise,
                                               [=](std::size_t j) { return mine[j] == 0; });
    }
    return total;
}

// Drops experts in place. experts, weights (tokens, k), -1 where there is none; latency (tokens or 1, n_experts) with
// latency_stride n_experts or 0, positive; available (n_experts,) or null; dropped_weight (tokens,) is written.
inline PruneResult prune(std::int32_t* experts, double* weights, std::size_t tokens, std::size_t k,
                         const double* latency, std::size_t latency_stride, std::size_t n_experts,
                         const std::uint8_t* available, const PruneOptions& options, double* dropped_weight) {
    check_assignment(experts, weights, tokens * k, n_experts);
    for (std::size_t t = 0; t < tokens; ++t) {
        std::int32_t* mine = experts + t * k;
        for (std::size_t j = 0; j < k; ++j) {
            if (mine[j] < 0) weights[t * k + j] = 0.0;
        }
        dropped_weight[t] = available == nullptr
                                ? 1.0
                                : detail::drop(mine, weights + t * k, k, options.renormalise,
                                               [=](std::size_t j) { return available[mine[j]] == 0; });
    }
    PruneResult result{0.0, 0.0};
    if (options.cosine) {
        result = CosinePruning(experts, weights, tokens, k, latency, latency_stride, options).run(dropped_weight);
    } else {
        double sum = 0.0;
        for (std::size_t t = 0; t < tokens; ++t) {
            sum += detail::wlr_of_token(experts + t * k, weights + t * k, k, latency + t * latency_stride,
                                        options.wlr_sum);
        }
        result.wlr = tokens == 0 ? 0.0 : sum / static_cast<double>(tokens);
    }
    for (std::size_t t = 0; t < tokens; ++t) dropped_weight[t] = 1.0 - dropped_weight[t];
    return result;
}

}  // namespace wdmoe
