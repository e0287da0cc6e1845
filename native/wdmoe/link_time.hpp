// Seconds that one token costs on a link, as a function of the band: convex and falling. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace wdmoe {

// The band counts in units of the total, and so do bits and snr: times stay what they are.
// Seconds at band b: flat / b + sum over the two directions of bits / (b log(1 + snr / b)), natural logarithm.
struct LinkTime {
    double flat;     // seconds where the band is 1
    double bits[2];  // times ln 2; 0 where that direction costs nothing
    double snr[2];

    struct Point {
        double time, slope, bend;  // value, first and second derivative by the band
    };

    bool is_free() const { return flat == 0.0 && bits[0] == 0.0 && bits[1] == 0.0; }

    // Seconds that no band can shorten.
    double limit() const {
        double sum = 0.0;
        for (int d = 0; d < 2; ++d) sum += bits[d] > 0.0 ? bits[d] / snr[d] : 0.0;
        return sum;
    }

    // A band from which `band_for` may start: exact where all is flat, else what 1 bit/s/Hz would need.
    double guess(double seconds) const { return (flat + (bits[0] + bits[1]) * 1.4426950408889634) / seconds; }

    double time(double band) const {
        double sum = flat / band;
        for (int d = 0; d < 2; ++d) {
            if (bits[d] > 0.0) sum += bits[d] / (band * log_1p(snr[d] / band));
        }
        return sum;
    }

    Point at(double band) const {
        Point p{flat / band, -flat / (band * band), 2.0 * flat / (band * band * band)};
        for (int d = 0; d < 2; ++d) {
            if (bits[d] == 0.0) continue;
            const double x = snr[d] / band, log = log_1p(x), v = x / (1.0 + x);
            // rate = band log; its elasticity (log - v) / log loses all digits at low SNR unless expanded
            const double gain = x < 1e-3 ? x * x * (0.5 - x * (2.0 / 3.0 - x * (0.75 - x * (0.8 - x * (5.0 / 6.0)))))
                                         : log - v;
            const double term = bits[d] / (band * log), e = gain / log;
            p.time += term;
            p.slope -= term * e / band;
            p.bend += term * (2.0 * e * e + v * v / log) / (band * band);
        }
        return p;
    }

    // The band within [low, high] at which the time is `seconds`; the nearer end where there is none.
    double band_for(double seconds, double start, double low, double high) const {
        double band = std::clamp(start, low, high);
        for (int step = 0; step < 80; ++step) {
            const Point p = at(band);
            // Newton on 1 / time, which is concave: from the left it never overshoots, and a/b takes one step
            const double move = (p.time / seconds - 1.0) * p.time / -p.slope;
            const double next = std::clamp(std::max(band + move, 0.1 * band), low, high);
            const bool done = std::abs(next - band) <= 1e-9 * band;  // quadratic: the next step would be 1e-18
            band = next;
            if (done) break;
        }
        return band;
    }

private:
    static double log_1p(double x) { return x > 0.0625 ? std::log(1.0 + x) : std::log1p(x); }
};

// Of device k, the band in units of `unit_hz`. links (5, devices) bits down, bits up, SNR in hertz (or, if `flat`,
// efficiency in bit/s/Hz) down, up, and compute seconds, which are no part of it.
inline LinkTime link_of(const double* links, std::size_t devices, std::size_t k, bool flat, double unit_hz) {
    LinkTime link{0.0, {0.0, 0.0}, {1.0, 1.0}};
    for (std::size_t d = 0; d < 2; ++d) {
        const double bits = links[d * devices + k], strength = links[(2 + d) * devices + k];
        if (bits == 0.0) continue;
        if (flat) {
            link.flat += bits / strength / unit_hz;
        } else {
            link.bits[d] = bits * 0.6931471805599453 / unit_hz;
            link.snr[d] = strength / unit_hz;
        }
    }
    return link;
}

}  // namespace wdmoe
