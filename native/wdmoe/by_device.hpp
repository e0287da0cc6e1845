// The assignments of each device, heaviest first. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace wdmoe {

// What a selection policy is given. Borrowed, and checked by the caller.
struct Assignments {
    std::size_t tokens, top_k, devices;
    const std::int32_t* device;  // (tokens, top_k), -1: nobody serves it
    const double* weight;        // (tokens, top_k)

    std::size_t size() const { return tokens * top_k; }
};

// Device k has the places begin[k] to begin[k + 1]. item: position in (tokens, top_k).
struct ByDevice {
    struct Entry {
        double weight;
        std::uint32_t item;
    };
    std::vector<std::size_t> begin;
    std::vector<Entry> entries;

    std::size_t count(std::size_t k) const { return begin[k + 1] - begin[k]; }
};

// Who serves each assignment, and what it weighs: -1 and 0 where there is none. experts (tokens, top_k); device_of
// (n_experts,), or (tokens, top_k) where n_experts is 0 -> device, weight (tokens, top_k).
// Throws std::invalid_argument for an index out of range.
inline void resolve(const std::int32_t* experts, const double* given_weight, std::size_t n,
                    const std::int32_t* device_of, std::size_t n_experts, std::size_t devices, std::int32_t* device,
                    double* weight) {
    const auto end = static_cast<std::int64_t>(n_experts > 0 ? n_experts : std::size_t{1} << 31);
    const auto outside = [](const char* name, std::int64_t value, std::int64_t limit) {
        return std::invalid_argument(std::string(name) + " must be from -1 to " + std::to_string(limit - 1) + ", got " +
                                     std::to_string(value));
    };
    const auto limit = static_cast<std::int64_t>(devices);
    for (std::size_t e = 0; e < n_experts; ++e) {
        if (device_of[e] < -1 || device_of[e] >= limit) throw outside("device_of", device_of[e], limit);
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (experts[i] < -1 || experts[i] >= end) throw outside("experts", experts[i], end);
        const std::int32_t home = n_experts == 0 ? device_of[i] : experts[i] >= 0 ? device_of[experts[i]] : -1;
        if (home < -1 || home >= limit) throw outside("device_of", home, limit);
        device[i] = experts[i] >= 0 ? home : -1;
        weight[i] = experts[i] >= 0 ? given_weight[i] : 0.0;
    }
}

// Served assignments by weight, equal ones as they stand. A counting sort into buckets of like weight, each of which is
// then sorted: O(assignments) unless most weights are alike, O(n log n) at worst.
inline ByDevice heaviest_first(const Assignments& given) {
    const std::size_t n = given.size();
    double most = 0.0;
    for (std::size_t i = 0; i < n; ++i) most = std::max(most, given.weight[i]);
    std::size_t buckets = 16;
    while (buckets * given.devices < n) buckets *= 2;
    const double scale = most > 1e-200 ? static_cast<double>(buckets) / most : 0.0;
    std::vector<std::uint32_t> key(n), end(given.devices * buckets + 1, 0);
    for (std::size_t i = 0; i < n; ++i) {
        if (given.device[i] < 0) continue;
        const auto level = std::min(static_cast<std::size_t>(given.weight[i] * scale), buckets - 1);
        key[i] = static_cast<std::uint32_t>(static_cast<std::size_t>(given.device[i] + 1) * buckets - level);
        ++end[key[i]];  // keys begin at 1, so that the sums below are where buckets begin
    }
    for (std::size_t b = 1; b < end.size(); ++b) end[b] += end[b - 1];
    ByDevice out;
    out.entries.resize(end.back());
    for (std::size_t k = 0; k <= given.devices; ++k) out.begin.push_back(end[k * buckets]);
    for (std::size_t i = 0; i < n; ++i) {
        if (given.device[i] >= 0) {
            out.entries[end[key[i] - 1]++] = {given.weight[i], static_cast<std::uint32_t>(i)};
        }
    }
    // Now end[b] is where bucket b + 1 ends. Large buckets are sorted, then one pass of insertion puts the rest right.
    constexpr std::size_t large = 24;
    std::size_t start = 0;
    for (std::size_t b = 0; b + 1 < end.size(); ++b) {
        if (end[b] - start > large) {
            std::stable_sort(out.entries.begin() + start, out.entries.begin() + end[b],
                             [](const ByDevice::Entry& a, const ByDevice::Entry& b) { return a.weight > b.weight; });
        }
        start = end[b];
    }
    for (std::size_t k = 0; k < given.devices; ++k) {
        for (std::size_t i = out.begin[k] + 1; i < out.begin[k + 1]; ++i) {
            const ByDevice::Entry entry = out.entries[i];
            std::size_t to = i;
            for (; to > out.begin[k] && out.entries[to - 1].weight < entry.weight; --to) {
                out.entries[to] = out.entries[to - 1];
            }
            out.entries[to] = entry;
        }
    }
    return out;
}

// Position of the heaviest served assignment of a token, the first of equals; top_k where there is none.
inline std::size_t heaviest_of(const std::int32_t* device, const double* weight, std::size_t top_k) {
    std::size_t found = top_k;
    for (std::size_t j = 0; j < top_k; ++j) {
        if (device[j] >= 0 && (found == top_k || weight[j] > weight[found])) found = j;
    }
    return found;
}

}  // namespace wdmoe
