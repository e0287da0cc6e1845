// Many blocks that share one allocation: a primal-dual interior-point method made for this problem. Knows nothing of
// Python.
//
// With y_k the seconds per token of device k (instead of its band) the problem is linear but for one constraint:
//     minimise sum_i T_i   where  T_i - load_ik y_k - fixed_ik = s_ik >= 0,  sum_k band_k(y_k) = 1,  y_k in its range.
// A Newton step couples the y_k only through the T_i, so eliminating the larger of the two sets leaves a small dense
// system: O(blocks devices min(blocks, devices)) an iteration. Steps: Mehrotra's predictor and corrector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

#include "bandwidth.hpp"
#include "bandwidth_decided.hpp"
#include "bandwidth_quick.hpp"

namespace wdmoe {
namespace detail {

// Minus the sum over r of row_r row_r^T / scale_r below the diagonal, and `diagonal` on it -> out (n, n).
inline void schur(const double* rows, const double* scale, std::size_t n_rows, const double* diagonal, std::size_t n,
                  double* out) {
    for (std::size_t k = 0; k < n; ++k) {
        std::fill_n(out + k * n, k, 0.0);
        out[k * n + k] = diagonal[k];
    }
    std::size_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {  // four at a time: the sums are loaded and stored a quarter as often
        const double *a = rows + r * n, *b = a + n, *c = b + n, *d = c + n;
        const double sa = 1.0 / scale[r], sb = 1.0 / scale[r + 1], sc = 1.0 / scale[r + 2], sd = 1.0 / scale[r + 3];
        for (std::size_t k = 0; k < n; ++k) {
            const double ka = a[k] * sa, kb = b[k] * sb, kc = c[k] * sc, kd = d[k] * sd;
            double* __restrict mine = out + k * n;
            for (std::size_t l = 0; l < k; ++l) mine[l] -= (ka * a[l] + kb * b[l]) + (kc * c[l] + kd * d[l]);
        }
    }
    for (; r < n_rows; ++r) {
        const double* a = rows + r * n;
        for (std::size_t k = 0; k < n; ++k) {
            const double ka = a[k] / scale[r];
            double* __restrict mine = out + k * n;
            for (std::size_t l = 0; l < k; ++l) mine[l] -= ka * a[l];
        }
    }
}

// In place, lower triangle; the diagonal of the factor is stored inverted. A pivot that rounding has eaten is made
// huge, which takes its unknown out of the step.
inline void cholesky(double* a, const double* diagonal, std::size_t n) {
    for (std::size_t k = 0; k < n; ++k) {
        double* row = a + k * n;
        for (std::size_t j = 0; j < k; ++j) {
            const double* other = a + j * n;
            double even = row[j], odd = 0.0;
            std::size_t l = 0;
            for (; l + 2 <= j; l += 2) even -= row[l] * other[l], odd -= row[l + 1] * other[l + 1];
            if (l < j) even -= row[l] * other[l];
            row[j] = (even + odd) * other[j];
        }
        double pivot = row[k];
        for (std::size_t l = 0; l < k; ++l) pivot -= row[l] * row[l];
        row[k] = pivot > 1e-15 * diagonal[k] ? 1.0 / std::sqrt(pivot) : 1e-60;
    }
}

inline void cholesky_solve(const double* a, std::size_t n, double* x) {
    for (std::size_t k = 0; k < n; ++k) {
        double sum = x[k];
        for (std::size_t l = 0; l < k; ++l) sum -= a[k * n + l] * x[l];
        x[k] = sum * a[k * n + k];
    }
    for (std::size_t k = n; k-- > 0;) {
        const double value = x[k] * a[k * n + k];
        x[k] = value;
        for (std::size_t l = 0; l < k; ++l) x[l] -= a[k * n + l] * value;
    }
}

class ManyBlocks {
public:
    static constexpr std::size_t kStart = 30;  // steps from one start

    explicit ManyBlocks(const BandwidthCore& core)
        : core_(core), m_(core.rows), n_(core.columns), w_(core.width()), tall_(m_ >= w_) {
        for (std::size_t c = 0; c < n_; ++c) free_ = free_ && core.low[c] <= kSmallestShare && core.high[c] > 1.0;
    }

    // `start_band` (columns,) and `start_weight` (rows, width) of an earlier answer, or empty.
    void solve(const std::vector<double>& start_band, const std::vector<double>& start_weight, double tolerance,
               std::size_t limit, CoreAnswer& answer) {
        best_.latency = std::numeric_limits<double>::infinity();
        if (!start_weight.empty()) {
            begin(start_band, start_weight, 0.02);
            if (!judge(tolerance)) climb(tolerance, std::min(limit, std::size_t{12}));
        }
        // A start far inside the central path takes an iteration or two more, and saves the rare case that gets stuck.
        for (double gap = 0.5; !is_closed(tolerance) && best_.iterations < limit && gap < 1e3; gap *= 4.0) {
            begin({}, {}, gap);
            climb(tolerance, std::min(limit, best_.iterations + kStart));
        }
        if (best_.band.empty()) {
            begin({}, {}, 0.5);
            judge(tolerance);
        }
        std::swap(answer, best_);
    }

private:
    bool is_closed(double tolerance) const { return wdmoe::is_closed(best_.latency, best_.lower_bound, tolerance); }

    const BandwidthCore& core_;
    const std::size_t m_, n_, w_;
    const bool tall_;  // more blocks than devices: the T are eliminated, otherwise the y
    bool free_ = true;  // no floors, no caps: with them the price may fall to nothing
    double unit_s_ = 1.0;
    std::vector<double> load_, fixed_;                    // (m, w) in units of unit_s_ and of y at the start
    std::vector<double> band_, scale_, y_, y_low_, y_high_;  // (w)
    std::vector<double> first_, second_;                  // (w) derivatives of the band by y
    std::vector<double> slack_, weight_;                  // (m, w)
    std::vector<double> low_weight_, high_weight_;        // (w)
    double price_ = 0.0;
    int stuck_ = 0;

    // of one step
    std::vector<double> inverse_, ratio_, cross_;         // (m, w): 1 / s, D = w / s, D load (transposed unless tall_)
    std::vector<double> center_;                          // (m, w) the corrector's dw, in two stages
    std::vector<double> own_, reduced_;                   // (w), (small): diagonal without D, after elimination
    std::vector<double> row_diagonal_, column_diagonal_;  // (m), (w)
    std::vector<double> row_sum_, mean_load_;             // (m), (w)
    std::vector<double> matrix_, border_;                 // Cholesky factor, and its solution for the border
    std::vector<double> right_rows_, right_columns_, step_time_, step_y_;
    std::vector<double> last_below_, last_above_;         // (w) second order terms, then steps, of the range's multipliers
    double border_product_ = 0.0, step_price_ = 0.0, band_sum_ = 1.0;
    CoreAnswer best_;

    // Newton steps until the gap is closed, nothing moves any more, or `limit` iterations are spent in all.
    void climb(double tolerance, std::size_t limit) {
        stuck_ = 0;
        while (true) {
            const double gap = assemble();
            const bool closed = gap <= tolerance, lost = !(gap < 1e100) || !(gap > 1e-14) || stuck_ > 3;
            if (closed && judge(tolerance)) return;
            if (lost || best_.iterations >= limit) break;
            factor();
            advance(gap);
            ++best_.iterations;
        }
        judge(tolerance);
    }

    // A feasible point well inside: bands as if each device had to finish alone in time, or near the start given.
    void begin(const std::vector<double>& start_band, const std::vector<double>& start_weight, double gap) {
        const bool warm = !start_weight.empty();
        band_.assign(w_, 1.0);
        scale_.assign(w_, 1.0);
        std::vector<double> wish(n_);
        double sum = 0.0;
        for (std::size_t c = 0; c < n_; ++c) {
            const double each = core_.link[c].time(1.0 / static_cast<double>(n_));
            for (std::size_t r = 0; r < m_; ++r) wish[c] = std::max(wish[c], core_.load[r * w_ + c]);
            sum += wish[c] *= each;
        }
        for (std::size_t c = 0; c < n_; ++c) {
            wish[c] = wish[c] / sum + 1e-3 / static_cast<double>(n_);
            if (warm) wish[c] = 0.9 * std::max(start_band[c] - core_.low[c], 0.0) + 0.1 * wish[c];
        }
        share(wish);
        for (std::size_t c = 0; c < n_; ++c) scale_[c] = core_.link[c].time(band_[c]);
        scale_loads();
        y_.assign(w_, 1.0);
        y_low_.assign(w_, 0.0);
        y_high_.assign(w_, 2.0);
        for (std::size_t c = 0; c < n_; ++c) {
            y_low_[c] = core_.link[c].time(core_.high[c]) / scale_[c];
            y_high_[c] = core_.link[c].time(core_.low[c]) / scale_[c];
        }
        begin_times(gap);
        if (warm) {
            for (std::size_t j = 0; j < m_ * w_; ++j) weight_[j] = 0.9 * start_weight[j] + 0.1 * weight_[j];
        }
        begin_prices();
    }

    // Bands inside their ranges that sum to 1: above the floors as wished, bent below the caps.
    void share(const std::vector<double>& wish) {
        double below = 0.0, above = 0.0, factor = 1.0;  // above 0: not known yet
        for (int step = 0; step < 200; ++step) {
            double sum = 0.0;
            for (std::size_t c = 0; c < n_; ++c) {
                const double part = factor * wish[c], range = core_.high[c] - core_.low[c];
                band_[c] = core_.low[c] + (core_.high[c] < 1.0 ? part * range / (range + part) : std::min(part, 0.9));
                sum += band_[c];
            }
            if (std::abs(sum - 1.0) < 1e-3) return;
            (sum < 1.0 ? below : above) = factor;
            factor = above == 0.0 ? 2.0 * factor : 0.5 * (below + above);
        }
    }

    // Counts times so that the start has latency 1.
    void scale_loads() {
        load_ = core_.load;
        fixed_ = core_.fixed;
        unit_s_ = 0.0;
        for (std::size_t r = 0; r < m_; ++r) {
            double worst = 0.0;
            for (std::size_t c = 0; c < w_; ++c) {
                load_[r * w_ + c] *= scale_[c];
                worst = std::max(worst, load_[r * w_ + c] + fixed_[r * w_ + c]);
            }
            unit_s_ += worst;
        }
        for (double& value : load_) value /= unit_s_;
        for (double& value : fixed_) value /= unit_s_;
    }

    // Times at which all products of slack and multiplier are equal and multipliers sum to 1: a point on the central
    // path. `gap` is the gap it has, in units of the latency at the start.
    void begin_times(double gap) {
        const double center = gap / static_cast<double>(m_ * w_);
        slack_.resize(m_ * w_);
        weight_.resize(m_ * w_);
        for (std::size_t r = 0; r < m_; ++r) {
            double *slack = &slack_[r * w_], *weight = &weight_[r * w_], worst = 0.0;
            for (std::size_t c = 0; c < w_; ++c) worst = std::max(worst, load_[r * w_ + c] + fixed_[r * w_ + c]);
            for (std::size_t c = 0; c < w_; ++c) slack[c] = worst - load_[r * w_ + c] - fixed_[r * w_ + c];
            double lift = center;  // Newton from the left of a convex falling function
            for (int step = 0; step < 8; ++step) {
                double sum = 0.0, slope = 0.0;
                for (std::size_t c = 0; c < w_; ++c) {
                    weight[c] = center / (slack[c] + lift);
                    sum += weight[c];
                    slope += weight[c] * weight[c];
                }
                if (sum < 1.05) break;
                lift += (sum - 1.0) * sum * center / slope;
            }
            double sum = 0.0;
            for (std::size_t c = 0; c < w_; ++c) {
                slack[c] += lift;
                sum += weight[c] = center / slack[c];
            }
            for (std::size_t c = 0; c < w_; ++c) weight[c] /= sum;
        }
    }

    void begin_prices() {
        double center = 0.0;
        for (std::size_t j = 0; j < m_ * w_; ++j) center += weight_[j] * slack_[j];
        center /= static_cast<double>(m_ * w_);
        low_weight_.assign(w_, 0.0);
        high_weight_.assign(w_, 0.0);
        first_.assign(w_, 0.0);
        second_.assign(w_, 0.0);
        for (std::size_t c = 0; c < n_; ++c) {
            low_weight_[c] = center / (y_[c] - y_low_[c]);
            high_weight_[c] = center / (y_high_[c] - y_[c]);
        }
        derive();
        double pull = 0.0, give = 0.0;
        for (std::size_t r = 0; r < m_; ++r) {
            for (std::size_t c = 0; c < n_; ++c) pull += weight_[r * w_ + c] * load_[r * w_ + c] * y_[c];
        }
        for (std::size_t c = 0; c < n_; ++c) give -= first_[c] * y_[c];
        price_ = pull / give;
        const std::size_t small = tall_ ? w_ : m_;
        inverse_.resize(m_ * w_);
        cross_.resize(m_ * w_);
        center_.resize(m_ * w_);
        ratio_.resize(m_ * w_);
        own_.resize(w_);
        reduced_.resize(small);
        row_diagonal_.resize(m_);
        column_diagonal_.resize(w_);
        row_sum_.resize(m_);
        mean_load_.resize(w_);
        matrix_.resize(small * small);
        border_.resize(small);
        right_rows_.resize(m_);
        right_columns_.resize(w_);
        step_time_.resize(m_);
        step_y_.resize(w_);
        last_below_.resize(w_);
        last_above_.resize(w_);
    }

    // Bands and their derivatives at the present y.
    void derive() {
        band_sum_ = 0.0;
        for (std::size_t c = 0; c < n_; ++c) {
            const LinkTime::Point p = core_.link[c].at(band_[c]);
            first_[c] = scale_[c] / p.slope;
            second_[c] = p.bend * first_[c] * first_[c] / -p.slope;
            band_sum_ += band_[c];
        }
    }

    // Diagonals and cross terms of the Newton system. Returns the duality gap, in units of the latency at the start.
    double assemble() {
        double gap = 0.0;
        std::fill(mean_load_.begin(), mean_load_.end(), 0.0);
        for (std::size_t c = 0; c < w_; ++c) own_[c] = 1.0;
        for (std::size_t c = 0; c < n_; ++c) {
            const double below = y_[c] - y_low_[c], above = y_high_[c] - y_[c];
            own_[c] = price_ * second_[c] + low_weight_[c] / below + high_weight_[c] / above;
            gap += low_weight_[c] * below + high_weight_[c] * above;
        }
        column_diagonal_ = own_;
        for (std::size_t r = 0; r < m_; ++r) {
            const double *load = &load_[r * w_], *slack = &slack_[r * w_], *weight = &weight_[r * w_];
            double *inverse = &inverse_[r * w_], *ratios = &ratio_[r * w_];
            for (std::size_t c = 0; c < w_; ++c) {
                inverse[c] = 1.0 / slack[c];
                const double ratio = weight[c] * inverse[c], cross = ratio * load[c];
                ratios[c] = ratio;
                mean_load_[c] += weight[c] * load[c];
                column_diagonal_[c] += cross * load[c];
            }
            double diagonal = 0.0, sum = 0.0;
            for (std::size_t c = 0; c < w_; ++c) {
                diagonal += ratios[c];
                sum += weight[c];
                gap += weight[c] * slack[c];
            }
            row_diagonal_[r] = diagonal;
            row_sum_[r] = sum;
            if (tall_) {
                for (std::size_t c = 0; c < w_; ++c) cross_[r * w_ + c] = ratios[c] * load[c];
            } else {
                for (std::size_t c = 0; c < w_; ++c) cross_[c * m_ + r] = ratios[c] * load[c];
            }
        }
        return gap;
    }

    // Diagonal that is left after elimination, without the cancellation that a difference would bring: where one term
    // makes up nearly all of a sum, what is left is the sum of the others.
    void reduce_diagonal() {
        const std::size_t sums = tall_ ? m_ : w_, small = tall_ ? w_ : m_;
        for (std::size_t j = 0; j < small; ++j) reduced_[j] = tall_ ? own_[j] : 0.0;
        for (std::size_t i = 0; i < sums; ++i) {
            const double total = tall_ ? row_diagonal_[i] : column_diagonal_[i];
            const double* cross = &cross_[i * small];
            const double* load = tall_ ? &load_[i * w_] : &load_[i];
            const std::size_t stride = tall_ ? 1 : w_;
            std::size_t largest = 0;
            double others = tall_ ? 0.0 : own_[i], most = -1.0;
            for (std::size_t j = 0; j < small; ++j) {
                // tall: D and D load^2; wide: D load^2 and D
                const double ratio = tall_ ? ratio_[i * w_ + j] : ratio_[j * w_ + i];
                const double square = cross[j] * load[j * stride], part = tall_ ? ratio : square;
                reduced_[j] += (tall_ ? square : ratio) * std::max(total - part, 0.0) / total;
                if (part > most) {
                    if (most > 0.0) others += most;
                    most = part;
                    largest = j;
                } else {
                    others += part;
                }
            }
            const double wrong = std::max(total - most, 0.0);
            const double outer = tall_ ? cross[largest] * load[largest] : ratio_[largest * w_ + i];
            reduced_[largest] += outer * (others - wrong) / total;
        }
    }

    void factor() {
        const std::size_t small = tall_ ? w_ : m_;
        reduce_diagonal();
        const double* diagonal = reduced_.data();
        const double* other = tall_ ? row_diagonal_.data() : column_diagonal_.data();
        schur(cross_.data(), other, tall_ ? m_ : w_, diagonal, small, matrix_.data());
        cholesky(matrix_.data(), diagonal, small);
        border_product_ = 0.0;
        if (tall_) {
            border_ = first_;
        } else {
            std::fill(border_.begin(), border_.end(), 0.0);
            for (std::size_t c = 0; c < w_; ++c) {
                const double pull = first_[c] / column_diagonal_[c];
                for (std::size_t r = 0; r < m_; ++r) border_[r] += cross_[c * m_ + r] * pull;
                border_product_ += first_[c] * pull;
            }
        }
        const std::vector<double> plain = border_;
        cholesky_solve(matrix_.data(), small, border_.data());
        for (std::size_t j = 0; j < small; ++j) border_product_ += plain[j] * border_[j];
    }

    // Solves the Newton system for right_rows_ and right_columns_.
    void newton() {
        const double excess = 1.0 - band_sum_;
        if (tall_) {
            step_y_ = right_columns_;
            for (std::size_t r = 0; r < m_; ++r) {
                const double each = right_rows_[r] / row_diagonal_[r];
                for (std::size_t c = 0; c < w_; ++c) step_y_[c] += cross_[r * w_ + c] * each;
            }
            cholesky_solve(matrix_.data(), w_, step_y_.data());
            double product = -excess;
            for (std::size_t c = 0; c < n_; ++c) product += first_[c] * step_y_[c];
            step_price_ = product / border_product_;
            for (std::size_t c = 0; c < w_; ++c) step_y_[c] -= step_price_ * border_[c];
            for (std::size_t r = 0; r < m_; ++r) {
                double sum = right_rows_[r];
                for (std::size_t c = 0; c < w_; ++c) sum += cross_[r * w_ + c] * step_y_[c];
                step_time_[r] = sum / row_diagonal_[r];
            }
            return;
        }
        // plain border g = E Q^-1 first: its product with the solution for the rest is border_ times that rest
        step_time_ = right_rows_;
        double product = -excess;
        for (std::size_t c = 0; c < w_; ++c) {
            const double each = right_columns_[c] / column_diagonal_[c];
            for (std::size_t r = 0; r < m_; ++r) step_time_[r] += cross_[c * m_ + r] * each;
            product += first_[c] * each;
        }
        for (std::size_t r = 0; r < m_; ++r) product += border_[r] * step_time_[r];
        cholesky_solve(matrix_.data(), m_, step_time_.data());
        step_price_ = product / border_product_;
        for (std::size_t r = 0; r < m_; ++r) step_time_[r] -= step_price_ * border_[r];
        for (std::size_t c = 0; c < w_; ++c) {
            double even = right_columns_[c] - step_price_ * first_[c], odd = 0.0;
            std::size_t r = 0;
            for (; r + 2 <= m_; r += 2) {
                even += cross_[c * m_ + r] * step_time_[r];
                odd += cross_[c * m_ + r + 1] * step_time_[r + 1];
            }
            if (r < m_) even += cross_[c * m_ + r] * step_time_[r];
            step_y_[c] = (even + odd) / column_diagonal_[c];
        }
    }

    // The predictor aims at no gap at all: how far it gets says how far the corrector may aim.
    void advance(double gap) {
        for (std::size_t r = 0; r < m_; ++r) right_rows_[r] = -1.0;
        for (std::size_t c = 0; c < w_; ++c) right_columns_[c] = -price_ * first_[c];
        newton();
        const double aim = predicted(gap);
        const double wait = free_ && gap < 0.03 ? std::min(0.8, 10.0 * unsettled() / gap) : 0.0;
        const double keep = std::max(aim * aim * aim, wait);
        const double centered = keep * gap / static_cast<double>(m_ * w_ + 2 * n_);
        correct(centered);
        newton();
        move(centered, gap);
    }

    // What it costs that the bands are not at their price yet, in units of the gap. A device that needs little comes
    // nearer to its band by a constant factor a step; were the gap closed before, no room would be left to move in.
    double unsettled() const {
        double sum = 0.0;
        for (std::size_t c = 0; c < n_; ++c) {
            const double force = mean_load_[c] + price_ * first_[c] - low_weight_[c] + high_weight_[c];
            sum += force * force / (2.0 * price_ * second_[c]);
        }
        return sum;
    }

    // Share of the gap that is left after the longest predictor step.
    double predicted(double gap) const {
        double least = 0.0, most = -1.0, linear = 0.0, square = 0.0;  // of t = ds / s; dw / w is -1 - t
        for (std::size_t r = 0; r < m_; ++r) {
            const double* load = &load_[r * w_];
            for (std::size_t c = 0; c < w_; ++c) {
                const double t = (step_time_[r] - load[c] * step_y_[c]) * inverse_[r * w_ + c];
                const double product = weight_[r * w_ + c] * slack_[r * w_ + c] * t;
                least = std::min(least, t);
                most = std::max(most, t);
                linear += product;
                square += product * t;
            }
        }
        for (std::size_t c = 0; c < n_; ++c) {
            const double below = step_y_[c] / (y_[c] - y_low_[c]), above = -step_y_[c] / (y_high_[c] - y_[c]);
            const double lower = low_weight_[c] * step_y_[c], upper = -high_weight_[c] * step_y_[c];
            least = std::min({least, below, above});
            most = std::max({most, below, above});
            linear += lower + upper;
            square += lower * below + upper * above;
        }
        const double primal = std::min(1.0, least < 0.0 ? -1.0 / least : 1.0);
        const double dual = std::min(1.0, most > -1.0 ? 1.0 / (1.0 + most) : 1.0);
        // sum of w s (1 + primal t) (1 - dual - dual t)
        const double left = gap * (1.0 - dual) + linear * (primal * (1.0 - dual) - dual) - square * primal * dual;
        return std::clamp(left / gap, 0.0, 1.0);
    }

    // Right-hand sides of the corrector, from the predictor's step.
    void correct(double centered) {
        for (std::size_t c = 0; c < w_; ++c) right_columns_[c] = -mean_load_[c] - price_ * first_[c];
        for (std::size_t c = 0; c < n_; ++c) {
            const double below = y_[c] - y_low_[c], above = y_high_[c] - y_[c], step = step_y_[c];
            const double b = step / below, a = -step / above;
            last_below_[c] = b * (1.0 + b);
            last_above_[c] = a * (1.0 + a);
            right_columns_[c] += centered / below + low_weight_[c] * last_below_[c];
            right_columns_[c] -= centered / above + high_weight_[c] * last_above_[c];
        }
        for (std::size_t r = 0; r < m_; ++r) {
            const double* load = &load_[r * w_];
            double sum = 0.0;
            for (std::size_t c = 0; c < w_; ++c) {
                const double inverse = inverse_[r * w_ + c], weight = weight_[r * w_ + c];
                const double t = (step_time_[r] - load[c] * step_y_[c]) * inverse;
                const double value = centered * inverse - weight + weight * t * (1.0 + t);
                center_[r * w_ + c] = value;
                right_columns_[c] -= value * load[c];
            }
            for (std::size_t c = 0; c < w_; ++c) sum += center_[r * w_ + c];
            right_rows_[r] = sum - (1.0 - row_sum_[r]);
        }
    }

    // Goes `reach` of the way to where the first slack or multiplier would vanish, at most the whole step.
    void move(double centered, double gap) {
        const double reach = std::max(0.99, 1.0 - gap);
        double least = 0.0, most = 0.0;  // of ds / s, and of -dw / w
        for (std::size_t r = 0; r < m_; ++r) {
            const double* load = &load_[r * w_];
            for (std::size_t c = 0; c < w_; ++c) {
                const std::size_t j = r * w_ + c;
                const double t = (step_time_[r] - load[c] * step_y_[c]) * inverse_[j];
                center_[j] -= weight_[j] * t;
                least = std::min(least, t);
                most = std::max(most, -center_[j] / weight_[j]);
            }
        }
        for (std::size_t c = 0; c < n_; ++c) {
            const double below = y_[c] - y_low_[c], above = y_high_[c] - y_[c], step = step_y_[c];
            const double b = step / below, a = -step / above;
            const double lower = centered / below / low_weight_[c] - 1.0 - b + last_below_[c];
            const double upper = centered / above / high_weight_[c] - 1.0 - a + last_above_[c];
            least = std::min({least, b, a});
            most = std::max({most, -lower, -upper});
            last_below_[c] = lower * low_weight_[c];
            last_above_[c] = upper * high_weight_[c];
        }
        const double primal = least < 0.0 ? std::min(1.0, -reach / least) : 1.0;
        const double dual = most > 0.0 ? std::min(1.0, reach / most) : 1.0;
        stuck_ = std::max(primal, dual) < 1e-4 ? stuck_ + 1 : 0;
        apply(primal, dual);
        if (band_sum_ - 1.0 > 0.1 * gap) slow_down();
    }

    void apply(double primal, double dual) {
        for (std::size_t r = 0; r < m_; ++r) {
            const double* load = &load_[r * w_];
            double *slack = &slack_[r * w_], *weight = &weight_[r * w_], *step = &center_[r * w_];
            for (std::size_t c = 0; c < w_; ++c) {
                slack[c] += primal * (step_time_[r] - load[c] * step_y_[c]);
                weight[c] += dual * step[c];
            }
        }
        price_ = std::max(price_ + dual * step_price_, 0.01 * price_);  // 0 where caps decide: must not stop the others
        for (std::size_t c = 0; c < n_; ++c) {
            low_weight_[c] += dual * last_below_[c];
            high_weight_[c] += dual * last_above_[c];
            y_[c] += primal * step_y_[c];
            const double guess = std::max(band_[c] + primal * first_[c] * step_y_[c], 0.5 * band_[c]);
            band_[c] = core_.link[c].band_for(y_[c] * scale_[c], guess, core_.low[c], core_.high[c]);
        }
        derive();
    }

    // The band is convex in y, so a step overdraws it. Taking all times longer by one factor repairs that and leaves
    // every slack positive; without it the gap closes faster than the overdraft, and the method gets stuck.
    void slow_down() {
        double pull = 0.0;
        for (std::size_t c = 0; c < n_; ++c) pull -= first_[c] * y_[c];
        const double factor = 1.0 + (band_sum_ - 1.0) * band_sum_ / pull;
        if (!(factor < 1e3)) return;
        for (std::size_t c = 0; c < n_; ++c) {
            const double to = std::min(factor * y_[c], y_[c] + 0.9 * (y_high_[c] - y_[c]));
            const double held = y_[c] - to / factor;
            for (std::size_t r = 0; held > 0.0 && r < m_; ++r) slack_[r * w_ + c] += load_[r * w_ + c] * held;
            band_[c] = core_.link[c].band_for(to * scale_[c], band_[c] * y_[c] / to, core_.low[c], core_.high[c]);
            y_[c] = to;
        }
        for (std::size_t j = 0; j < m_ * w_; ++j) slack_[j] = factor * slack_[j] + (factor - 1.0) * fixed_[j];
        derive();
    }

    // Rounds to a feasible answer with its certificate, keeps the best of each. True when the gap is closed.
    bool judge(double tolerance) {
        std::vector<double> band(band_.begin(), band_.begin() + static_cast<std::ptrdiff_t>(n_));
        fit(core_, band);
        const double latency = core_latency(core_, band);
        std::vector<double> weight = weight_;
        const double price = price_ * unit_s_;
        if (!std::isfinite(latency)) return false;
        double bound = core_lower_bound(core_, weight, price, band);
        if (latency - bound > tolerance * latency) {  // caps may have made the band worth nothing
            bound = std::max(bound, core_lower_bound(core_, weight, 1e-12 * price, core_.high));
        }
        if (latency < best_.latency || best_.band.empty()) {
            best_.latency = latency;
            best_.band = std::move(band);
        }
        if (std::isfinite(bound) && (bound > best_.lower_bound || best_.weight.empty())) {
            best_.lower_bound = bound;
            best_.weight = std::move(weight);
            best_.price = price;
        }
        best_.lower_bound = std::min(best_.lower_bound, best_.latency);
        return is_closed(tolerance);
    }
};

// Equal parts of what the floors leave, as far as the caps let them: feasible, whatever went wrong before.
inline std::vector<double> even_bands(const BandwidthCore& core) {
    double rest = 1.0;
    for (const double low : core.low) rest -= low;
    std::vector<double> band(core.columns);
    for (std::size_t c = 0; c < core.columns; ++c) {
        band[c] = std::min(core.low[c] + std::max(rest, 0.0) / static_cast<double>(core.columns), core.high[c]);
    }
    return band;
}

// Answers a task of any size. What it is worth is for others to say.
inline CoreAnswer solve_core(const BandwidthCore& core, const std::vector<double>& start_band,
                             const std::vector<double>& start_weight, double tolerance, std::size_t limit) {
    CoreAnswer answer;
    double lows = 0.0, highs = 0.0;
    for (std::size_t c = 0; c < core.columns; ++c) lows += core.low[c], highs += core.high[c];
    if (core.columns == 0 || highs <= 1.0) {
        set_bands(core, core.high, answer);  // nothing can better it
    } else if (lows >= 1.0 - kRounding) {
        set_bands(core, core.low, answer);  // no room is left
    } else if (core.rows == 1) {
        OneBlock(core, tolerance).solve(answer);
    } else {
        ManyBlocks(core).solve(start_band, start_weight, tolerance, limit, answer);
    }
    const bool usable = answer.band.size() == core.columns && std::isfinite(answer.latency);
    if (!usable) set_bands(core, even_bands(core), answer);
    answer.lower_bound = std::min(answer.lower_bound, answer.latency);
    if (is_closed(answer.latency, answer.lower_bound, tolerance) && !answer.weight.empty()) return answer;
    bound_alone(core, answer);
    const bool hurried = limit < ManyBlocks::kStart;  // it takes as long as some ten steps
    if (core.rows > 1 && !hurried && !is_closed(answer.latency, answer.lower_bound, tolerance)) {
        DecidedBlocks(core).better(answer);
    }
    return answer;
}

}  // namespace detail

class BandwidthSolver {
public:
    BandwidthSolver(const BandwidthTask& task, const BandwidthArrays& out) : task_(task), out_(out), builder_(task) {}

    BandwidthAnswer solve() {
        std::fill_n(out_.band_hz, task_.devices, 0.0);
        std::fill_n(out_.block_latency, task_.blocks, 0.0);
        std::fill_n(out_.weight, task_.blocks * task_.devices, 0.0);
        constexpr double infinite = std::numeric_limits<double>::infinity();
        if (!builder_.build(core_)) {
            std::fill_n(out_.block_latency, task_.blocks, infinite);
            return {infinite, infinite, 0.0, status_of(infinite, infinite, task_.tolerance), 0};
        }
        std::vector<double> band, weight;
        start(band, weight);
        const detail::CoreAnswer answer = detail::solve_core(core_, band, weight, task_.tolerance, task_.limit);
        write(answer);
        double latency = 0.0;
        for (std::size_t i = 0; i < task_.blocks; ++i) latency += out_.block_latency[i];
        const double bound = std::min(answer.lower_bound, latency);
        return {latency, bound, answer.price / core_.unit_hz, status_of(latency, bound, task_.tolerance),
                answer.iterations};
    }

private:
    const BandwidthTask& task_;
    const BandwidthArrays& out_;
    detail::CoreBuilder builder_;
    detail::BandwidthCore core_;

    void start(std::vector<double>& band, std::vector<double>& weight) const {
        if (task_.start_hz == nullptr || task_.start_weight == nullptr) return;
        const std::size_t width = core_.width();
        for (const std::size_t k : core_.device) band.push_back(task_.start_hz[k] / core_.unit_hz);
        weight.assign(core_.rows * width, 0.0);
        for (std::size_t r = 0; r < core_.rows; ++r) {
            const double* row = task_.start_weight + core_.block[r] * task_.devices;
            double sum = 0.0;
            for (std::size_t c = 0; c < core_.columns; ++c) sum += weight[r * width + c] = row[core_.device[c]];
            if (core_.base_column) sum += weight[r * width + core_.columns] = row[core_.base_device[r]];
            for (std::size_t c = 0; c < width; ++c) {
                weight[r * width + c] = sum > 0.0 ? weight[r * width + c] / sum : 1.0 / static_cast<double>(width);
            }
        }
    }

    void write(const detail::CoreAnswer& answer) {
        std::copy(core_.given_hz.begin(), core_.given_hz.end(), out_.band_hz);
        for (std::size_t c = 0; c < core_.columns; ++c) {
            const std::size_t k = core_.device[c];
            out_.band_hz[k] = std::clamp(answer.band[c] * core_.unit_hz, builder_.floor_of(k), builder_.cap_of(k));
        }
        std::vector<double> each(task_.devices, 0.0);
        for (std::size_t k = 0; k < task_.devices; ++k) {
            if (out_.band_hz[k] > 0.0) each[k] = builder_.link(k, 1.0).time(out_.band_hz[k]);
        }
        for (std::size_t i = 0; i < task_.blocks; ++i) write_block(i, each);
        const std::size_t width = core_.width();
        for (std::size_t r = 0; r < core_.rows; ++r) {
            double* row = out_.weight + core_.block[r] * task_.devices;
            const auto mine = answer.weight.begin() + static_cast<std::ptrdiff_t>(r * width);
            if (!(std::accumulate(mine, mine + static_cast<std::ptrdiff_t>(width), 0.0) > 0.0)) continue;
            std::fill_n(row, task_.devices, 0.0);
            for (std::size_t c = 0; c < core_.columns; ++c) row[core_.device[c]] = answer.weight[r * width + c];
            if (core_.base_column) row[core_.base_device[r]] += answer.weight[r * width + core_.columns];
        }
    }

    // Its latency, and all weight on the slowest device: what a block that is not in the core keeps.
    void write_block(std::size_t i, const std::vector<double>& each) {
        std::size_t slowest = task_.devices;
        double worst = 0.0;
        for (std::size_t k = 0; k < task_.devices; ++k) {
            const double load = builder_.load_of(i, k);
            if (!(load > 0.0)) continue;
            const double seconds = load * each[k] + builder_.fixed_of(i, k);
            if (slowest != task_.devices && (seconds <= worst || std::isnan(worst))) continue;
            worst = seconds;
            slowest = k;
        }
        out_.block_latency[i] = worst;
        if (slowest < task_.devices) out_.weight[i * task_.devices + slowest] = 1.0;
    }
};

inline BandwidthAnswer solve_bandwidth(const BandwidthTask& task, const BandwidthArrays& out) {
    BandwidthAnswer answer;
    if (detail::QuickBlock(task).solve(out, answer)) return answer;
    return BandwidthSolver(task, out).solve();
}

}  // namespace wdmoe
