// The everyday case of bandwidth allocation, one block without floors and caps, in a few microseconds: one Newton step
// moves the common finish time and all bands at once. Knows nothing of Python.
//
// With v_k = 1 / t_k, concave and rising, and u = 1 / T: v_k(band_k) = load_k u / (1 - fixed_k u), sum band_k = 1. Both
// sides are expanded to second order, so each step cubes the error.
//
// The certificate costs nothing: for bands that sum to 1, weights 1 / (-load_k t_k') put each band where
// core_lower_bound looks for its least value, and what they prove is the weighted mean of the finish times.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bandwidth.hpp"

namespace wdmoe {
namespace detail {

// log2 of x >= 1 within 0.09, but at least 2^-20: good for a first guess.
inline double rough_log2(double x) {
    const double value = static_cast<double>(std::bit_cast<std::uint64_t>(x)) * 0x1p-52 - 1023.0;
    return std::max(value, 0x1p-20);
}

class QuickBlock {
public:
    explicit QuickBlock(const BandwidthTask& task) : task_(task) {}

    // False where the task is none of these, or where Newton's method fails: what `out` holds then is of no use.
    bool solve(const BandwidthArrays& out, BandwidthAnswer& answer) {
        if (task_.blocks != 1 || task_.floor_hz != nullptr || task_.cap_hz != nullptr || !collect()) return false;
        for (std::size_t step = 1; step <= kMostSteps; ++step) {
            const Spread spread = evaluate();
            if (spread.latest - spread.earliest <= kEqual * spread.latest) {
                const int status = status_of(spread.latest, bound(spread), task_.tolerance);
                if (!(price_ > 1e-300) || !(smallest_ > kSmallestShare) || status != kOptimal) return false;
                write(out, spread);
                answer = {spread.latest, bound(spread), price_ / task_.total_hz, status, step};
                return true;
            }
            if (!advance(spread.latest)) return false;
        }
        return false;
    }

private:
    struct Device {
        LinkTime link;
        double load, fixed, band;
        std::size_t column;
        LinkTime::Point at{};
        double finish = 0.0, weight = 0.0;
        double here = 0.0, rise = 0.0, curve = 0.0, bend = 0.0;  // of one step: band as a polynomial in the change of u
    };

    struct Spread {
        double earliest, latest, mean;  // finish times, and their weighted mean
    };

    static constexpr std::size_t kMostSteps = 20;
    static constexpr double kEqual = 1e-12;  // finish times that differ by less are one

    const BandwidthTask& task_;
    std::vector<Device> devices_;
    double price_ = 0.0, smallest_ = 0.0;

    // The devices that compete, and a first guess of their bands. False where there are none, or others besides.
    bool collect() {
        const std::size_t n = task_.devices;
        devices_.reserve(n);
        double sum = 0.0;
        for (std::size_t k = 0; k < n; ++k) {
            const double load = task_.load[k];
            if (load == 0.0) continue;
            const double fixed = task_.fixed == nullptr ? 0.0 : task_.fixed[k];
            Device device{link_of(task_.links, n, k, task_.flat, task_.total_hz), load, 0.0, 0.0, k};
            device.fixed = load * task_.links[4 * n + k] + fixed;
            const LinkTime& link = device.link;
            double guess = link.flat;
            for (std::size_t d = 0; d < 2; ++d) {
                if (link.bits[d] > 0.0) guess += link.bits[d] / rough_log2(1.0 + link.snr[d] * static_cast<double>(n));
            }
            device.band = load * guess;
            if (!(device.band > 0.0)) return false;  // no bits to send
            sum += device.band;
            devices_.push_back(device);
        }
        if (!(sum > 0.0 && sum < 1e300)) return false;  // infinite where nothing gets through
        for (Device& device : devices_) device.band /= sum;
        return true;
    }

    // Times, slopes and weights at the present bands, which sum to 1.
    Spread evaluate() {
        Spread spread{INFINITY, 0.0, 0.0};
        double steep = 0.0;
        smallest_ = 1.0;
        for (Device& device : devices_) {
            device.at = device.link.at(device.band);
            device.finish = device.load * device.at.time + device.fixed;
            device.weight = -1.0 / (device.load * device.at.slope);
            steep += device.weight;
            spread.mean += device.weight * device.finish;
            spread.earliest = std::min(spread.earliest, device.finish);
            spread.latest = std::max(spread.latest, device.finish);
            smallest_ = std::min(smallest_, device.band);
        }
        price_ = 1.0 / steep;
        spread.mean *= price_;
        return spread;
    }

    // Moves the bands to where all finish at one time. False where that has no answer.
    bool advance(double latest) {
        const double u = 1.0 / latest;
        double constant = -1.0, linear = 0.0, square = 0.0;  // sum of the bands - 1, as a polynomial in the change of u
        for (Device& device : devices_) {
            const double per = 1.0 / (1.0 - device.fixed * u), time = device.at.time, slope = device.at.slope;
            const double per_speed = time * time / -slope;                    // 1 / v'
            const double bend = slope / time - 0.5 * device.at.bend / slope;  // -v'' / (2 v')
            device.here = (device.load * u * per - 1.0 / time) * per_speed;
            device.rise = device.load * per * per * per_speed;
            device.curve = device.rise * device.fixed * per;
            device.bend = std::abs(bend * device.here) < 0.5 ? bend : 0.0;  // far away the second order misleads
            const double tilt = 1.0 + 2.0 * device.bend * device.here;
            constant += device.band + device.here + device.bend * device.here * device.here;
            linear += device.rise * tilt;
            square += device.curve * tilt + device.bend * device.rise * device.rise;
        }
        const double root = linear * linear - 4.0 * square * constant;
        const double change = root >= 0.0 ? -2.0 * constant / (linear + std::sqrt(root)) : -constant / linear;
        double sum = 0.0;
        for (Device& device : devices_) {
            const double move = device.here + change * (device.rise + change * device.curve);
            const double next = device.band + move + device.bend * move * move;
            device.band = std::clamp(next, 0.1 * device.band, 10.0 * device.band);
            sum += device.band;
        }
        if (!(sum > 0.0 && sum < 1e300)) return false;
        const double shrink = 1.0 / sum;
        for (Device& device : devices_) device.band *= shrink;
        return true;
    }

    // What the weighted mean proves, less what rounding may have added to it.
    double bound(const Spread& spread) const {
        return std::max(spread.mean - kRounding * (spread.mean + 2.0 * price_), 0.0);
    }

    void write(const BandwidthArrays& out, const Spread& spread) const {
        std::fill_n(out.band_hz, task_.devices, 0.0);
        std::fill_n(out.weight, task_.devices, 0.0);
        out.block_latency[0] = spread.latest;
        for (const Device& device : devices_) {
            out.band_hz[device.column] = device.band * task_.total_hz;
            out.weight[device.column] = device.weight * price_;
        }
    }
};

}  // namespace detail
}  // namespace wdmoe
