// The k largest of one gate row. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace wdmoe::detail {

// Vectors of two by hand (a GCC and Clang extension), which every x86-64 and aarch64 has: compilers find none of this.
typedef double Pair __attribute__((vector_size(16)));
typedef std::int64_t PairMask __attribute__((vector_size(16)));

inline Pair load_pair(const double* from) {
    Pair pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}
inline Pair larger(Pair a, Pair b) { return a > b ? a : b; }
inline Pair smaller(Pair a, Pair b) { return a < b ? a : b; }
inline void larger_first(Pair& a, Pair& b) {
    const Pair most = larger(a, b);
    b = smaller(a, b);
    a = most;
}

// Finds the k largest of a row, largest first, ties to the lower index. No branch depends on what the values are, but
// for how many are left by the first of two steps:
// 1. For k up to 4: the fourth largest of the maxima of 8 columns is a bar that the four largest reach, and mostly few
//    others. Those that do are ranked by comparing each with each.
// 2. For a larger k, or where too many reach the bar: the row is cut into blocks whose maxima are kept.
class RowTopK {
public:
    explicit RowTopK(std::size_t n_experts)
        : n_experts_(n_experts), blocks_((n_experts + block - 1) / block), values_(blocks_ * block, taken),
          maxima_(blocks_) {}

    // available (n_experts,) or null -> experts, weights (k,): -1 and 0 where fewer than k are available.
    void run(const double* gate, std::size_t k, const std::uint8_t* available, std::int32_t* experts,
             double* weights) {
        const bool as_it_is = available == nullptr && n_experts_ == blocks_ * block;
        if (!as_it_is) copy(gate, available);
        const double* row = as_it_is ? gate : values_.data();
        if (k <= 4 && rank_few(row, k, experts, weights)) return;
        if (as_it_is) copy(gate, available);
        by_blocks(k, experts, weights);
    }

private:
    static constexpr std::size_t block = 8;
    static constexpr std::size_t few = 8;
    static constexpr double taken = -1.0;  // below every usable weight

    std::size_t n_experts_, blocks_;
    std::vector<double> values_, maxima_;

    void copy(const double* gate, const std::uint8_t* available) {
        for (std::size_t e = 0; e < n_experts_; ++e) values_[e] = gate[e];
        for (std::size_t e = 0; available != nullptr && e < n_experts_; ++e) {
            if (available[e] == 0) values_[e] = taken;
        }
    }

    // False where more than a few reach the bar.
    bool rank_few(const double* row, std::size_t k, std::int32_t* experts, double* weights) const {
        const double bar = fourth_of_columns(row);
        std::int32_t expert[few + 1] = {};
        std::size_t count = 0;
        for (std::size_t at = 0; at < blocks_ * block; at += 64) {
            for (std::uint64_t bits = reaching(row + at, std::min(blocks_ * block - at, std::size_t{64}), bar); bits != 0;
                 bits &= bits - 1) {
                expert[count] = static_cast<std::int32_t>(at) + std::countr_zero(bits);
                if (++count > few) return false;
            }
        }
        double value[few];
        for (std::size_t i = 0; i < few; ++i) value[i] = i < count ? row[expert[i]] : taken;
        unsigned rank[few] = {};
#pragma GCC unroll 8  // kept as loops, these cost a quarter of all
        for (std::size_t i = 1; i < few; ++i) {
#pragma GCC unroll 8
            for (std::size_t j = 0; j < i; ++j) {  // j is the lower expert: of equals it goes first
                const unsigned first = value[j] >= value[i];
                rank[i] += first;
                rank[j] += 1 - first;
            }
        }
        double ranked_value[few];
        std::int32_t ranked_expert[few];
        for (std::size_t i = 0; i < few; ++i) {
            ranked_value[rank[i]] = value[i];
            ranked_expert[rank[i]] = expert[i];
        }
        for (std::size_t j = 0; j < k; ++j) hand_out(ranked_value[j], ranked_expert[j], experts[j], weights[j]);
        return true;
    }

    // The fourth largest of the largest of each column, where the row is read as lines of 8.
    double fourth_of_columns(const double* row) const {
        Pair a = load_pair(row), b = load_pair(row + 2), c = load_pair(row + 4), d = load_pair(row + 6);
        for (const double* line = row + block; line < row + blocks_ * block; line += block) {
            a = larger(load_pair(line), a);
            b = larger(load_pair(line + 2), b);
            c = larger(load_pair(line + 4), c);
            d = larger(load_pair(line + 6), d);
        }
        larger_first(a, b);  // a network that sorts four, in both lanes
        larger_first(c, d);
        larger_first(a, c);
        larger_first(b, d);
        larger_first(b, c);
        // Of two sorted lists of four, the larger of the first's i-th and the other's (5 - i)-th are the four largest.
        const Pair most = smaller(larger(a, Pair{d[1], d[0]}), larger(b, Pair{c[1], c[0]}));
        return std::min(most[0], most[1]);
    }

    // Bit i: whether values[i] is at least the bar. n: 8 to 64, whole lines of 8.
    static std::uint64_t reaching(const double* values, std::size_t n, double bar) {
        const Pair least = {bar, bar};
        PairMask bits = {0, 0};  // of the even ones, and of the odd ones
        for (std::size_t i = n; i >= block; i -= block) {
            const double* line = values + i - block;
            bits = (bits << 4) | ((load_pair(line + 6) >= least) & 8) | ((load_pair(line + 4) >= least) & 4) |
                   ((load_pair(line + 2) >= least) & 2) | ((load_pair(line) >= least) & 1);
        }
        bits = (bits | bits << 16) & 0x0000ffff0000ffff;  // a gap before each bit, for those of the other lane
        bits = (bits | bits << 8) & 0x00ff00ff00ff00ff;
        bits = (bits | bits << 4) & 0x0f0f0f0f0f0f0f0f;
        bits = (bits | bits << 2) & 0x3333333333333333;
        bits = (bits | bits << 1) & 0x5555555555555555;
        return static_cast<std::uint64_t>(bits[0]) | static_cast<std::uint64_t>(bits[1]) << 1;
    }

    // Of the copied row.
    void by_blocks(std::size_t k, std::int32_t* experts, double* weights) {
        for (std::size_t b = 0; b < blocks_; ++b) maxima_[b] = largest(b);
        for (std::size_t j = 0; j < k; ++j) {
            double most = maxima_[0];
            for (std::size_t b = 1; b < blocks_; ++b) most = maxima_[b] > most ? maxima_[b] : most;
            const std::size_t in = first_equal(maxima_.data(), blocks_, most);
            const std::size_t at = in * block + first_equal(&values_[in * block], block, most);
            hand_out(most, static_cast<std::int32_t>(at), experts[j], weights[j]);
            values_[at] = taken;
            maxima_[in] = largest(in);
        }
    }

    static void hand_out(double value, std::int32_t at, std::int32_t& expert, double& weight) {
        expert = value < 0.0 ? -1 : at;
        weight = value < 0.0 ? 0.0 : value;
    }

    double largest(std::size_t b) const {
        const double* v = &values_[b * block];
        double pair[2] = {v[0], v[1]};
        for (std::size_t i = 2; i < block; i += 2) {
            pair[0] = v[i] > pair[0] ? v[i] : pair[0];
            pair[1] = v[i + 1] > pair[1] ? v[i + 1] : pair[1];
        }
        return pair[1] > pair[0] ? pair[1] : pair[0];
    }

    static std::size_t first_equal(const double* values, std::size_t n, double value) {
        std::size_t found = 0;
        for (std::size_t i = n; i-- > 0;) found = values[i] == value ? i : found;
        return found;
    }
};

}  // namespace wdmoe::detail
