// Turns "expert of each token" into "work of each device". Knows nothing of Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace wdmoe {

// Where one device's part begins and ends in the flat arrays.
struct DeviceSpan {
    std::int32_t device;
    std::size_t tokens_begin, tokens_end;    // into token_rows
    std::size_t experts_begin, experts_end;  // into experts and counts
    std::size_t pairs_begin, pairs_end;      // into rows and weights
};

// Two passes over the (token, expert) pairs: `count` fixes the sizes, `fill` writes into arrays of those sizes.
// Time O(tokens k + experts + devices), and that much scratch memory.
class Grouping {
public:
    std::vector<DeviceSpan> spans;  // one for each device that has work, by ascending device
    std::size_t tokens_total = 0, experts_total = 0, pairs_total = 0;
    std::size_t unserved = 0;  // pairs whose expert no device serves

    // experts (tokens, k), -1 where dropped; device_of (n_experts,), -1 where not served.
    // Throws std::invalid_argument on an index out of range.
    void count(const std::int32_t* experts, std::size_t tokens, std::size_t k, const std::int32_t* device_of,
               std::size_t n_experts) {
        experts_ = experts, tokens_ = tokens, k_ = k, device_of_ = device_of;
        const std::size_t devices = device_count(device_of, n_experts);
        pairs_of_expert_.assign(n_experts, 0);
        per_device_.assign(devices, {});
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t j = 0; j < k; ++j) count_pair(t, j, n_experts);
        }
        for (std::size_t e = 0; e < n_experts; ++e) {
            if (pairs_of_expert_[e] > 0 && device_of[e] >= 0) ++per_device_[index(device_of[e])].experts;
        }
        lay_out();
    }

    // weights (tokens, k). Outputs have the lengths that `count` found; `rows` index into the device's own token_rows.
    void fill(const float* weights, std::int32_t* token_rows, std::int32_t* experts, std::int32_t* counts,
              std::int32_t* rows, float* pair_weights) {
        fill_experts(experts, counts);
        for (PerDevice& mine : per_device_) mine.last_token = none;
        for (std::size_t t = 0; t < tokens_; ++t) {
            for (std::size_t j = 0; j < k_; ++j) {
                const std::int32_t expert = experts_[t * k_ + j];
                if (expert < 0 || device_of_[expert] < 0) continue;
                PerDevice& mine = per_device_[index(device_of_[expert])];
                if (mine.last_token != t) {
                    mine.last_token = t;
                    token_rows[mine.tokens_at++] = static_cast<std::int32_t>(t);
                }
                const std::size_t at = pair_at_[index(expert)]++;
                rows[at] = static_cast<std::int32_t>(mine.tokens_at - mine.tokens_begin - 1);
                pair_weights[at] = weights[t * k_ + j];
            }
        }
    }

private:
    static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
    static constexpr std::int32_t most_devices = 1 << 16;

    struct PerDevice {
        std::size_t tokens = 0, experts = 0, pairs = 0;
        std::size_t last_token = none;
        std::size_t tokens_begin = 0, tokens_at = 0, experts_at = 0, pairs_at = 0;
    };

    const std::int32_t* experts_ = nullptr;
    const std::int32_t* device_of_ = nullptr;
    std::size_t tokens_ = 0, k_ = 0;
    std::vector<std::int32_t> pairs_of_expert_;
    std::vector<std::size_t> pair_at_;
    std::vector<PerDevice> per_device_;

    static std::size_t index(std::int32_t value) { return static_cast<std::size_t>(value); }

    static std::size_t device_count(const std::int32_t* device_of, std::size_t n_experts) {
        std::int32_t highest = -1;
        for (std::size_t e = 0; e < n_experts; ++e) {
            if (device_of[e] < -1 || device_of[e] >= most_devices) {
                throw std::invalid_argument("device_of[" + std::to_string(e) + "] is " + std::to_string(device_of[e]) +
                                            ", need -1 (not served) to " + std::to_string(most_devices - 1));
            }
            if (device_of[e] > highest) highest = device_of[e];
        }
        return static_cast<std::size_t>(highest + 1);
    }

    void count_pair(std::size_t t, std::size_t j, std::size_t n_experts) {
        const std::int32_t expert = experts_[t * k_ + j];
        if (expert < -1 || expert >= static_cast<std::int64_t>(n_experts)) {
            throw std::invalid_argument("experts[" + std::to_string(t) + ", " + std::to_string(j) + "] is " +
                                        std::to_string(expert) + ", need -1 (dropped) to " +
                                        std::to_string(static_cast<std::int64_t>(n_experts) - 1));
        }
        if (expert < 0) return;
        if (device_of_[expert] < 0) {
            ++unserved;
            return;
        }
        ++pairs_of_expert_[index(expert)];
        PerDevice& mine = per_device_[index(device_of_[expert])];
        ++mine.pairs;
        if (mine.last_token != t) {
            mine.last_token = t;
            ++mine.tokens;
        }
    }

    void lay_out() {
        for (std::size_t d = 0; d < per_device_.size(); ++d) {
            PerDevice& mine = per_device_[d];
            if (mine.pairs == 0) continue;
            mine.tokens_begin = mine.tokens_at = tokens_total;
            mine.experts_at = experts_total;
            mine.pairs_at = pairs_total;
            tokens_total += mine.tokens, experts_total += mine.experts, pairs_total += mine.pairs;
            spans.push_back({static_cast<std::int32_t>(d), mine.tokens_begin, tokens_total, mine.experts_at,
                             experts_total, mine.pairs_at, pairs_total});
        }
    }

    void fill_experts(std::int32_t* experts, std::int32_t* counts) {
        pair_at_.assign(pairs_of_expert_.size(), 0);
        for (std::size_t e = 0; e < pairs_of_expert_.size(); ++e) {
            if (pairs_of_expert_[e] == 0) continue;
            PerDevice& mine = per_device_[index(device_of_[e])];
            experts[mine.experts_at] = static_cast<std::int32_t>(e);
            counts[mine.experts_at++] = pairs_of_expert_[e];
            pair_at_[e] = mine.pairs_at;
            mine.pairs_at += index(pairs_of_expert_[e]);
        }
    }
};

}  // namespace wdmoe
