// Which copy of its expert serves each assignment, so that the slowest device is done soonest. Knows nothing of Python.
//
// Assignments of one expert are alike, so only the counts x_ed (expert, device) matter. From a greedy start, work of a
// last device is moved along chains of devices to one that is then still done before the end. Where no chain is left,
// the end is the least there is: the devices that the chains reach serve experts that none but they hold, and each
// would be as late with one assignment more; less for the last one would be that for another.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace wdmoe {

struct CopyTask {
    std::size_t tokens, top_k, n_experts, devices;
    const std::int32_t* experts;  // (tokens, top_k), -1 where there is none
    const std::uint8_t* holders;  // (n_experts, devices), not 0 where the device holds the expert
    const double* token_s;        // (devices,) > 0
    const double* busy_s;         // (devices,) >= 0, or null
};

class CopyChooser {
public:
    explicit CopyChooser(const CopyTask& task)
        : task_(task), load_(task.devices, 0), held_by_(task.n_experts), count_(task.n_experts, 0),
          quota_(task.n_experts * task.devices, 0) {
        for (std::size_t e = 0; e < task.n_experts; ++e) {
            for (std::size_t d = 0; d < task.devices; ++d) {
                if (task.holders[e * task.devices + d] != 0) held_by_[e].push_back(d);
            }
        }
        for (std::size_t i = 0; i < task.tokens * task.top_k; ++i) {
            const std::int32_t e = task.experts[i];
            if (e < -1 || e >= static_cast<std::int64_t>(task.n_experts)) {
                throw std::invalid_argument("experts must be from -1 to " +
                                            std::to_string(static_cast<std::int64_t>(task.n_experts) - 1) + ", got " +
                                            std::to_string(e));
            }
            if (e >= 0) ++count_[e];
        }
    }

    // device (tokens, top_k): -1 where nobody holds the expert. Returns when the last device is done, seconds.
    double choose(std::int32_t* device) {
        begin();
        while (relieve()) {
        }
        const double end_s = finish(last(), 0);
        for (std::size_t t = 0; t < task_.tokens; ++t) hand_out(t * task_.top_k, device + t * task_.top_k);
        return end_s;
    }

private:
    static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

    const CopyTask task_;
    std::vector<std::size_t> load_;                   // (devices,)
    std::vector<std::vector<std::size_t>> held_by_;   // (n_experts,) devices
    std::vector<std::size_t> count_;                  // (n_experts,) assignments
    std::vector<std::size_t> quota_;                  // (n_experts, devices) x_ed

    std::size_t& quota(std::size_t e, std::size_t d) { return quota_[e * task_.devices + d]; }

    double finish(std::size_t d, std::size_t more) const {
        const std::size_t load = load_[d] + more;
        return load == 0 ? 0.0 : (task_.busy_s == nullptr ? 0.0 : task_.busy_s[d]) +
                                     static_cast<double>(load) * task_.token_s[d];
    }

    std::size_t last() const {
        std::size_t found = 0;
        for (std::size_t d = 1; d < task_.devices; ++d) {
            if (finish(d, 0) > finish(found, 0)) found = d;
        }
        return found;
    }

    // Each assignment to the holder that is done with it first; experts with the fewest holders begin.
    void begin() {
        std::vector<std::size_t> order(task_.n_experts);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [this](std::size_t a, std::size_t b) { return held_by_[a].size() < held_by_[b].size(); });
        for (const std::size_t e : order) {
            for (std::size_t i = 0; i < count_[e] && !held_by_[e].empty(); ++i) {
                std::size_t soonest = held_by_[e].front();
                for (const std::size_t d : held_by_[e]) {
                    if (finish(d, 1) < finish(soonest, 1)) soonest = d;
                }
                ++quota(e, soonest);
                ++load_[soonest];
            }
        }
    }

    // Moves one assignment off the last device, along the shortest chain. False where there is none.
    bool relieve() {
        const std::size_t from = last();
        const double end_s = finish(from, 0);
        std::vector<std::size_t> before(task_.devices, kNone), by(task_.devices, kNone), queue{from};
        std::vector<char> seen(task_.n_experts, 0);
        for (std::size_t at = 0; at < queue.size(); ++at) {
            const std::size_t d = queue[at];
            if (d != from && finish(d, 1) < end_s) {
                move_along(before, by, from, d);
                return true;
            }
            for (std::size_t e = 0; e < task_.n_experts; ++e) {
                if (quota(e, d) == 0 || seen[e] != 0) continue;
                seen[e] = 1;
                for (const std::size_t next : held_by_[e]) {
                    if (next == from || before[next] != kNone) continue;
                    before[next] = d;
                    by[next] = e;
                    queue.push_back(next);
                }
            }
        }
        return false;
    }

    void move_along(const std::vector<std::size_t>& before, const std::vector<std::size_t>& by, std::size_t from,
                    std::size_t to) {
        ++load_[to];
        for (std::size_t d = to; d != from; d = before[d]) {
            ++quota(by[d], d);
            --quota(by[d], before[d]);
        }
        --load_[from];
    }

    // One token's assignments; where there is a choice, on a device that has another of the token's experts: it then
    // gets the hidden state once for both.
    void hand_out(std::size_t at, std::int32_t* device) {
        std::fill_n(device, task_.top_k, -1);
        for (const bool alone : {true, false}) {  // those without a choice first
            for (std::size_t j = 0; j < task_.top_k; ++j) {
                const std::int32_t e = task_.experts[at + j];
                if (e < 0 || held_by_[e].empty() || (held_by_[e].size() == 1) != alone) continue;
                std::size_t found = kNone;
                for (std::size_t other = 0; other < task_.top_k && found == kNone; ++other) {
                    if (device[other] >= 0 && quota(e, device[other]) > 0) found = device[other];
                }
                for (std::size_t i = 0; found == kNone; ++i) {
                    if (quota(e, held_by_[e][i]) > 0) found = held_by_[e][i];
                }
                --quota(e, found);
                device[j] = static_cast<std::int32_t>(found);
            }
        }
    }
};

}  // namespace wdmoe
