// Sheds the light work of the devices that would be last. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "by_device.hpp"

namespace wdmoe {

// token_s (devices,) > 0; kept (tokens, top_k) is written. wdmoe/solver/bottleneck.py says what it does.
inline void shed_bottleneck(const Assignments& given, const double* token_s, double light, std::uint8_t* kept) {
    std::vector<std::size_t> load(given.devices, 0);
    std::vector<std::vector<ByDevice::Entry>> sheddable(given.devices);
    for (std::size_t t = 0; t < given.tokens; ++t) {
        const std::int32_t* device = given.device + t * given.top_k;
        const double* weight = given.weight + t * given.top_k;
        const std::size_t heaviest = heaviest_of(device, weight, given.top_k);
        double sum = 0.0;
        for (std::size_t j = 0; j < given.top_k; ++j) sum += device[j] >= 0 ? weight[j] : 0.0;
        for (std::size_t j = 0; j < given.top_k; ++j) {
            const std::size_t item = t * given.top_k + j;
            kept[item] = device[j] >= 0;
            if (device[j] < 0) continue;
            ++load[device[j]];
            if (j != heaviest && weight[j] <= light * sum) {
                sheddable[device[j]].push_back({weight[j], static_cast<std::uint32_t>(item)});
            }
        }
    }
    double end_s = 0.0;
    for (std::size_t k = 0; k < given.devices; ++k) {
        end_s = std::max(end_s, static_cast<double>(load[k] - sheddable[k].size()) * token_s[k]);
    }
    for (std::size_t k = 0; k < given.devices; ++k) {
        const double in_time = std::floor(end_s / token_s[k] * (1.0 + 1e-12));
        if (in_time >= static_cast<double>(load[k])) continue;
        auto& mine = sheddable[k];
        const std::size_t shed = std::min(load[k] - static_cast<std::size_t>(in_time), mine.size());
        std::nth_element(mine.begin(), mine.begin() + static_cast<std::ptrdiff_t>(shed), mine.end(),
                         [](const ByDevice::Entry& a, const ByDevice::Entry& b) {
                             return a.weight != b.weight ? a.weight < b.weight : a.item < b.item;
                         });
        for (std::size_t i = 0; i < shed; ++i) kept[mine[i].item] = 0;
    }
}

}  // namespace wdmoe
