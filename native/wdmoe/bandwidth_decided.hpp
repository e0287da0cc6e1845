// Many blocks where band is plentiful: times that no band shortens say which device each block waits for, and then
// the search of bandwidth_blocks.hpp sees little difference between bands. Knows nothing of Python.
//
// With the device of each block given, what is left is  minimise sum_k A_k t_k(band_k),  A_k the loads of the blocks that
// wait for k: all bands have one price. Devices that no block waits for get what lets them end in time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "bandwidth.hpp"

namespace wdmoe {
namespace detail {

class DecidedBlocks {
public:
    explicit DecidedBlocks(const BandwidthCore& core)
        : core_(core), slowest_(core.rows), load_(core.width()), need_(core.columns) {}

    // Betters an answer, or its bound, where it can.
    void better(CoreAnswer& answer) {
        std::vector<double> band = answer.band;
        for (int turn = 0; turn < kTurns; ++turn) {
            const std::vector<std::size_t> before = slowest_;
            core_latency(core_, band, slowest_.data());
            if (turn > 0 && before == slowest_) break;
            if (!decide(band)) return;
            keep(band, answer);
        }
    }

private:
    static constexpr int kTurns = 8, kSteps = 200;
    static constexpr double kFull = 1e-13;  // of the band: what may be left

    const BandwidthCore& core_;
    std::vector<std::size_t> slowest_;  // (rows,) column
    std::vector<double> load_;          // (width,) A_k
    std::vector<double> need_;          // (columns,) band of those that no block waits for
    double price_ = 0.0;

    double finish(std::size_t r, std::size_t c, double band) const {
        const std::size_t at = r * core_.width() + c;
        return c < core_.columns ? core_.load[at] * core_.link[c].time(band) + core_.fixed[at] : core_.fixed[at];
    }

    // New bands for the present `slowest_`. False where they do not sum to 1 at any price.
    bool decide(std::vector<double>& band) {
        std::fill(load_.begin(), load_.end(), 0.0);
        for (std::size_t r = 0; r < core_.rows; ++r) {
            load_[slowest_[r]] += core_.load[r * core_.width() + slowest_[r]];
        }
        double rest = 1.0;
        for (std::size_t c = 0; c < core_.columns; ++c) {
            need_[c] = load_[c] > 0.0 ? 0.0 : needed(c);
            if (!(need_[c] <= core_.high[c])) return false;
            rest -= need_[c];
        }
        double below = 0.0, above = 0.0;  // prices at which too much is taken, and too little; 0: not known yet
        price_ = 1.0;
        for (int step = 0; step < kSteps; ++step) {
            double sum = 0.0;
            for (std::size_t c = 0; c < core_.columns; ++c) {
                if (!(load_[c] > 0.0)) continue;
                band[c] = band_at_price(core_.link[c], load_[c], price_, core_.low[c], core_.high[c], band[c]).band;
                sum += band[c];
            }
            if (std::abs(sum - rest) <= kFull) break;
            (sum > rest ? below : above) = price_;
            price_ = below == 0.0 ? 1e-3 * price_ : above == 0.0 ? 1e3 * price_ : std::sqrt(below * above);
            if (!(price_ > 1e-300 && price_ < 1e300)) break;
        }
        for (std::size_t c = 0; c < core_.columns; ++c) {
            if (!(load_[c] > 0.0)) band[c] = need_[c];
        }
        return true;
    }

    // Band with which the device ends, in each block, before the one that it waits for could with all the band.
    double needed(std::size_t c) const {
        double most = core_.low[c];
        for (std::size_t r = 0; r < core_.rows; ++r) {
            const double load = core_.load[r * core_.width() + c];
            if (!(load > 0.0)) continue;
            const std::size_t s = slowest_[r];
            const double end = finish(r, s, s < core_.columns ? std::min(core_.high[s], 1.0) : 1.0);
            const double each = (end - core_.fixed[r * core_.width() + c]) / load;
            if (!(each > 0.0)) return 2.0 * core_.high[c];
            most = std::max(most, core_.link[c].band_for(each, most, core_.low[c], core_.high[c]));
        }
        return most;
    }

    void keep(std::vector<double> band, CoreAnswer& answer) const {
        fit(core_, band);
        const double latency = core_latency(core_, band);
        if (latency < answer.latency) set_bands(core_, band, answer);
        std::vector<double> weight(core_.rows * core_.width(), 0.0);
        for (std::size_t r = 0; r < core_.rows; ++r) weight[r * core_.width() + slowest_[r]] = 1.0;
        const double bound = core_lower_bound(core_, weight, price_, band);
        if (std::isfinite(bound) && bound > answer.lower_bound) {
            answer.lower_bound = bound;
            answer.weight = weight;
            answer.price = price_;
        }
        answer.lower_bound = std::min(answer.lower_bound, answer.latency);
    }
};

}  // namespace detail
}  // namespace wdmoe
