// The two messages of a layer as bytes and back: an order (Run) and its answer (Result). Knows nothing of Python.
//
// Only frames that look as this project's writers make them are read here: fields in the order of the table, no
// checksum. `false` says "something else", never "wrong": the general codec judges that, and is the reference.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace wdmoe {

static_assert(std::endian::native == std::endian::little || std::endian::native == std::endian::big);

inline constexpr std::size_t kMostExperts = 256;  // of one order; the general codec takes more
inline constexpr std::size_t kMostMapBytes = 4094;
inline constexpr std::uint64_t kIndexEnd = std::uint64_t{1} << 31;

// A tensor's dtype and where it lies in its frame.
struct FrameTensor {
    bool half = false;  // float16, else 32 bits wide
    std::size_t at = 0, bytes = 0;
};

struct OrderFrame {
    std::uint64_t attempt = 0;
    std::uint32_t layer = 0;
    double remaining_s = 0, bandwidth_hz = 0;
    std::size_t experts = 0;  // and as many counts
    std::uint32_t expert[kMostExperts], count[kMostExperts];
    std::size_t token_count = 0, hidden = 0, pairs = 0;
    FrameTensor tokens, rows, weights;
};

struct AnswerFrame {
    std::uint64_t attempt = 0;
    std::uint32_t layer = 0;
    double compute_s = 0, residence_s = 0, link_down_s = 0, link_up_s = 0;
    std::size_t token_count = 0, hidden = 0;
    FrameTensor partial;
};

namespace frames {

inline constexpr std::uint8_t kOrderNumber = 18, kAnswerNumber = 19;
inline constexpr std::uint8_t kOrderMap = 0x89, kAnswerMap = 0x87;  // msgpack maps of 9 and 7 fields

// Reads msgpack that must be one certain thing after the other. After the first surprise everything is false.
class MapReader {
public:
    MapReader(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}

    bool good() const { return good_; }
    bool finished() const { return good_ && at_ == end_; }

    // A text of fewer than 32 bytes, of which it must be this one.
    void text(std::string_view wanted) {
        byte(static_cast<std::uint8_t>(0xa0 | wanted.size()));
        if (!need(wanted.size())) return;
        good_ = std::memcmp(at_, wanted.data(), wanted.size()) == 0;
        at_ += wanted.size();
    }

    void byte(std::uint8_t wanted) {
        if (need(1)) good_ = *at_++ == wanted;
    }

    // A whole number below `end` (0: any), however many bytes it takes.
    std::uint64_t number(std::uint64_t end) {
        if (!need(1)) return 0;
        const std::uint8_t head = *at_++;
        std::uint64_t value = head;
        if (head >= 0xcc && head <= 0xcf) {
            value = big_endian(std::size_t{1} << (head - 0xcc));
        } else if (head > 0x7f) {
            good_ = false;
        }
        if (end != 0 && value >= end) good_ = false;
        return value;
    }

    // A finite double, zero or more.
    double amount() {
        byte(0xcb);
        const double value = std::bit_cast<double>(big_endian(8));
        if (!(value >= 0 && value <= 1.7976931348623157e308)) good_ = false;
        return value;
    }

    // Length of an array that has from 1 to kMostExperts values.
    std::size_t array() {
        if (!need(1)) return 0;
        const std::uint8_t head = *at_++;
        const std::size_t length = head == 0xdc ? static_cast<std::size_t>(big_endian(2)) : head - std::size_t{0x90};
        if ((head != 0xdc && (head < 0x90 || head > 0x9f)) || length < 1 || length > kMostExperts) {
            good_ = false;
            return 0;
        }
        return length;
    }

    // [dtype, length, length]: float32 or float16.
    void matrix(FrameTensor& tensor, std::size_t& rows, std::size_t& columns) {
        byte(0x93);
        tensor.half = need(4) && at_[2] == '1';
        text(tensor.half ? "f16" : "f32");
        rows = static_cast<std::size_t>(number(kIndexEnd));
        columns = static_cast<std::size_t>(number(kIndexEnd));
        if (rows == 0 || columns == 0) good_ = false;
    }

    // [dtype, length]
    std::size_t vector(std::string_view dtype) {
        byte(0x92);
        text(dtype);
        return static_cast<std::size_t>(number(kIndexEnd));
    }

private:
    const std::uint8_t* at_;
    const std::uint8_t* end_;
    bool good_ = true;

    bool need(std::size_t bytes) {
        if (static_cast<std::size_t>(end_ - at_) < bytes) good_ = false;
        return good_;
    }

    std::uint64_t big_endian(std::size_t bytes) {
        std::uint64_t value = 0;
        if (!need(bytes)) return 0;
        for (std::size_t i = 0; i < bytes; ++i) value = value << 8 | *at_++;
        return value;
    }
};

// Writes the same, the shortest way that there is for each number.
class MapWriter {
public:
    std::uint8_t data[kMostMapBytes];
    std::size_t size = 0;
    bool good = true;

    void byte(std::uint8_t value) {
        if (size < kMostMapBytes) {
            data[size++] = value;
        } else {
            good = false;
        }
    }

    void text(std::string_view value) {
        byte(static_cast<std::uint8_t>(0xa0 | value.size()));
        for (const char each : value) byte(static_cast<std::uint8_t>(each));
    }

    void number(std::uint64_t value) {
        if (value < 0x80) {
            byte(static_cast<std::uint8_t>(value));
        } else if (value < 0x100) {
            byte(0xcc), big_endian(value, 1);
        } else if (value < 0x10000) {
            byte(0xcd), big_endian(value, 2);
        } else if (value < std::uint64_t{1} << 32) {
            byte(0xce), big_endian(value, 4);
        } else {
            byte(0xcf), big_endian(value, 8);
        }
    }

    void amount(double value) { byte(0xcb), big_endian(std::bit_cast<std::uint64_t>(value), 8); }

    void array(const std::uint32_t* values, std::size_t n) {
        if (n < 16) {
            byte(static_cast<std::uint8_t>(0x90 | n));
        } else {
            byte(0xdc), big_endian(n, 2);
        }
        for (std::size_t i = 0; i < n; ++i) number(values[i]);
    }

    void matrix(const FrameTensor& tensor, std::size_t rows, std::size_t columns) {
        byte(0x93), text(tensor.half ? "f16" : "f32"), number(rows), number(columns);
    }

    void vector(std::string_view dtype, std::size_t length) { byte(0x92), text(dtype), number(length); }

private:
    void big_endian(std::uint64_t value, std::size_t bytes) {
        for (std::size_t i = bytes; i-- > 0;) byte(static_cast<std::uint8_t>(value >> (8 * i)));
    }
};

inline std::uint32_t little_endian(const std::uint8_t* at) {
    return static_cast<std::uint32_t>(at[0]) | static_cast<std::uint32_t>(at[1]) << 8 |
           static_cast<std::uint32_t>(at[2]) << 16 | static_cast<std::uint32_t>(at[3]) << 24;
}

inline std::size_t aligned(std::size_t at) { return (at + 7) & ~std::size_t{7}; }

// Where the parts of a frame are, `count` tensors: their places and the map's; false if the lengths are not the frame's.
inline bool lay_out(const std::uint8_t* frame, std::size_t size, std::uint8_t number, std::size_t count,
                    FrameTensor* const* tensors, std::size_t& map_at, std::size_t& map_bytes) {
    map_at = 4 + 4 * (1 + count);
    if (size < map_at || frame[1] != number || frame[2] != count || frame[3] != 0) return false;
    map_bytes = little_endian(frame + 4);
    std::size_t end = map_at + map_bytes;  // 32 bits each: no sum here overflows 64
    if (map_bytes > kMostMapBytes || end > size) return false;
    for (std::size_t i = 0; i < count; ++i) {
        FrameTensor& tensor = *tensors[i];
        tensor.at = aligned(end);
        tensor.bytes = little_endian(frame + 8 + 4 * i);
        if (tensor.at > size || tensor.bytes > size - tensor.at) return false;
        for (; end < tensor.at; ++end) {
            if (frame[end] != 0) return false;
        }
        end = tensor.at + tensor.bytes;
    }
    return end == size;
}

inline bool fits(const FrameTensor& tensor, std::size_t rows, std::size_t columns) {
    // Both are below 2**31, so that this does not overflow.
    return std::uint64_t{tensor.half ? 2u : 4u} * rows * columns == tensor.bytes;
}

inline std::size_t places(std::size_t map_bytes, std::size_t count, FrameTensor* const* tensors) {
    std::size_t end = 4 + 4 * (1 + count) + map_bytes;
    for (std::size_t i = 0; i < count; ++i) {
        tensors[i]->at = aligned(end);
        end = tensors[i]->at + tensors[i]->bytes;
    }
    return end;
}

inline void begin(std::uint8_t* frame, std::uint8_t version, std::uint8_t number, const MapWriter& map,
                  std::size_t count, FrameTensor* const* tensors) {
    const std::uint8_t head[4] = {version, number, static_cast<std::uint8_t>(count), 0};
    std::memcpy(frame, head, 4);
    std::size_t at = 4;
    for (std::size_t i = 0; i <= count; ++i) {
        const std::size_t length = i == 0 ? map.size : tensors[i - 1]->bytes;
        for (std::size_t shift = 0; shift < 32; shift += 8) frame[at++] = static_cast<std::uint8_t>(length >> shift);
    }
    std::memcpy(frame + at, map.data, map.size);
    at += map.size;
    for (std::size_t i = 0; i < count; ++i) {
        while (at < tensors[i]->at) frame[at++] = 0;
        at += tensors[i]->bytes;
    }
}

}  // namespace frames

// The rules of an order beyond its fields: experts ascend (so that none is there twice), counts are the pairs, each row
// is a token. rows (pairs,) in the machine's byte order.
inline bool agrees(const OrderFrame& order, const std::int32_t* rows) {
    std::uint64_t pairs = 0;
    for (std::size_t i = 0; i < order.experts; ++i) {
        if (order.count[i] < 1 || (i > 0 && order.expert[i] <= order.expert[i - 1])) return false;
        pairs += order.count[i];
    }
    if (order.experts == 0 || pairs != order.pairs) return false;
    for (std::size_t i = 0; i < order.pairs; ++i) {
        if (rows[i] < 0 || static_cast<std::size_t>(rows[i]) >= order.token_count) return false;
    }
    return true;
}

// What an order's frame holds; true only if it is all there and keeps to the rules. The version is the caller's to check.
inline bool read_order(const std::uint8_t* frame, std::size_t size, OrderFrame& order) {
    FrameTensor* const tensors[] = {&order.tokens, &order.rows, &order.weights};
    std::size_t map_at = 0, map_bytes = 0;
    if (!frames::lay_out(frame, size, frames::kOrderNumber, 3, tensors, map_at, map_bytes)) return false;
    frames::MapReader map(frame + map_at, map_bytes);
    map.byte(frames::kOrderMap);
    map.text("attempt"), order.attempt = map.number(0);
    map.text("layer"), order.layer = static_cast<std::uint32_t>(map.number(kIndexEnd));
    map.text("remaining_s"), order.remaining_s = map.amount();
    map.text("bandwidth_hz"), order.bandwidth_hz = map.amount();
    map.text("experts"), order.experts = map.array();
    for (std::size_t i = 0; map.good() && i < order.experts; ++i) {
        order.expert[i] = static_cast<std::uint32_t>(map.number(kIndexEnd));
    }
    map.text("counts");
    if (map.array() != order.experts) return false;
    for (std::size_t i = 0; map.good() && i < order.experts; ++i) {
        order.count[i] = static_cast<std::uint32_t>(map.number(kIndexEnd));
    }
    map.text("tokens"), map.matrix(order.tokens, order.token_count, order.hidden);
    map.text("rows"), order.pairs = map.vector("i32");
    map.text("weights");
    if (map.vector("f32") != order.pairs || !map.finished()) return false;
    return frames::fits(order.tokens, order.token_count, order.hidden) && frames::fits(order.rows, order.pairs, 1) &&
           frames::fits(order.weights, order.pairs, 1);
}

inline bool read_answer(const std::uint8_t* frame, std::size_t size, AnswerFrame& answer) {
    FrameTensor* const tensors[] = {&answer.partial};
    std::size_t map_at = 0, map_bytes = 0;
    if (!frames::lay_out(frame, size, frames::kAnswerNumber, 1, tensors, map_at, map_bytes)) return false;
    frames::MapReader map(frame + map_at, map_bytes);
    map.byte(frames::kAnswerMap);
    map.text("attempt"), answer.attempt = map.number(0);
    map.text("layer"), answer.layer = static_cast<std::uint32_t>(map.number(kIndexEnd));
    map.text("compute_s"), answer.compute_s = map.amount();
    map.text("residence_s"), answer.residence_s = map.amount();
    map.text("link_down_s"), answer.link_down_s = map.amount();
    map.text("link_up_s"), answer.link_up_s = map.amount();
    map.text("partial"), map.matrix(answer.partial, answer.token_count, answer.hidden);
    return map.finished() && frames::fits(answer.partial, answer.token_count, answer.hidden);
}

// The size of an order's frame, and its map and places; 0 if the map is too long. Tensors have their bytes set.
inline std::size_t plan_order(OrderFrame& order, frames::MapWriter& map) {
    map.byte(frames::kOrderMap);
    map.text("attempt"), map.number(order.attempt);
    map.text("layer"), map.number(order.layer);
    map.text("remaining_s"), map.amount(order.remaining_s);
    map.text("bandwidth_hz"), map.amount(order.bandwidth_hz);
    map.text("experts"), map.array(order.expert, order.experts);
    map.text("counts"), map.array(order.count, order.experts);
    map.text("tokens"), map.matrix(order.tokens, order.token_count, order.hidden);
    map.text("rows"), map.vector("i32", order.pairs);
    map.text("weights"), map.vector("f32", order.pairs);
    FrameTensor* const tensors[] = {&order.tokens, &order.rows, &order.weights};
    return map.good ? frames::places(map.size, 3, tensors) : 0;
}

inline std::size_t plan_answer(AnswerFrame& answer, frames::MapWriter& map) {
    map.byte(frames::kAnswerMap);
    map.text("attempt"), map.number(answer.attempt);
    map.text("layer"), map.number(answer.layer);
    map.text("compute_s"), map.amount(answer.compute_s);
    map.text("residence_s"), map.amount(answer.residence_s);
    map.text("link_down_s"), map.amount(answer.link_down_s);
    map.text("link_up_s"), map.amount(answer.link_up_s);
    map.text("partial"), map.matrix(answer.partial, answer.token_count, answer.hidden);
    FrameTensor* const tensors[] = {&answer.partial};
    return map.good ? frames::places(map.size, 1, tensors) : 0;
}

// frame has the size that was planned.
inline void write_order(OrderFrame& order, const frames::MapWriter& map, std::uint8_t version, const void* tokens,
                        const void* rows, const void* weights, std::uint8_t* frame) {
    FrameTensor* const tensors[] = {&order.tokens, &order.rows, &order.weights};
    frames::begin(frame, version, frames::kOrderNumber, map, 3, tensors);
    std::memcpy(frame + order.tokens.at, tokens, order.tokens.bytes);
    std::memcpy(frame + order.rows.at, rows, order.rows.bytes);
    std::memcpy(frame + order.weights.at, weights, order.weights.bytes);
}

inline void write_answer(AnswerFrame& answer, const frames::MapWriter& map, std::uint8_t version, const void* partial,
                         std::uint8_t* frame) {
    FrameTensor* const tensors[] = {&answer.partial};
    frames::begin(frame, version, frames::kAnswerNumber, map, 1, tensors);
    std::memcpy(frame + answer.partial.at, partial, answer.partial.bytes);
}

}  // namespace wdmoe
