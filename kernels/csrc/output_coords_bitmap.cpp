// Output voxels without sorting: marked in a bitmap of one slab (the last two axes) at a time.
//
// Inputs are grouped by slab, in any order within. An output slab is marked from the few input
// slabs that reach it, then read off in order, which also clears it: sorted and unique for free.
// What each input position reaches is found once per axis.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bits.h"
#include "coord_range.h"
#include "output_coords.h"

namespace fquant {
namespace {

// The outputs that each input position of one axis reaches, as many for every position: lists are
// padded by repetition, so that loops over them have no branch to mispredict.
struct AxisReach {
  int64_t low, size;           // of the outputs reached by any position; 0 of them: none at all
  int64_t width = 0;           // entries per position
  std::vector<int64_t> outputs;  // counted from `low`; -1 where a position reaches none
};

AxisReach axis_reach(const Reach& r, int axis, int64_t first, int64_t extent) {
  AxisReach reach;
  std::vector<int64_t> all, end;  // the outputs of one position after the other
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < extent; ++i) {
    const int64_t before = static_cast<int64_t>(all.size());
    for (int64_t k = r.kernel[axis] - 1; k >= 0; --k) {
      int64_t o;
      if (!r.output(axis, first + i, k, &o)) continue;
      all.push_back(o);
      low = std::min(low, o);
      high = std::max(high, o);
    }
    end.push_back(static_cast<int64_t>(all.size()));
    reach.width = std::max(reach.width, end.back() - before);
  }
  reach.low = reach.width == 0 ? 0 : low;
  reach.size = reach.width == 0 ? 0 : high - low + 1;
  reach.outputs.resize(extent * reach.width, -1);
  for (int64_t i = 0, begin = 0; i < extent; begin = end[i++]) {
    for (int64_t n = 0; n < reach.width && begin < end[i]; ++n) {
      reach.outputs[i * reach.width + n] = all[std::min(begin + n, end[i] - 1)] - low;
    }
  }
  return reach;
}

// What a position of the last axis marks: words of a line and bits of them. Nearly always one word,
// so the loop over the others is predicted.
struct Mark {
  int64_t word;
  uint64_t bits;
};
struct Marks {
  std::vector<Mark> first, others;
  std::vector<int64_t> end;  // of the others of a position
};

Marks marks_of(const AxisReach& x, int64_t extent) {
  Marks marks;
  for (int64_t i = 0; i < extent; ++i) {
    Mark mark{0, 0};
    bool any = false;
    for (int64_t n = 0; n < x.width; ++n) {
      const int64_t o = x.outputs[i * x.width + n];
      if (o < 0) continue;
      if (mark.bits != 0 && mark.word != o >> 6) {
        any ? marks.others.push_back(mark) : marks.first.push_back(mark);
        any = true;
        mark.bits = 0;
      }
      mark.word = o >> 6;
      mark.bits |= uint64_t{1} << (o & 63);
    }
    any ? marks.others.push_back(mark) : marks.first.push_back(mark);
    marks.end.push_back(static_cast<int64_t>(marks.others.size()));
  }
  return marks;
}

struct Point {
  int32_t y, x;
};

// The bitmap of a slab, and a byte per word of it that may have bits and per 64 of those: setting a
// byte does not wait for the one set before, as setting a bit of the same word would.
class Slab {
 public:
  Slab(int64_t rows, int64_t words) : rows_(rows), words_(words) {
    bits_.resize((rows + 1) * words);  // one row that is not an output's, for marks of no output
    some_.resize((bits_.size() + 63) / 64);
    word_.resize(some_.size() * 64);
  }

  void mark(const Point* points, int64_t count, const AxisReach& y, const Marks& marks) {
    // Locals, because bytes that are stored might be anything else.
    uint64_t* const bits = bits_.data();
    uint8_t *const word = word_.data(), *const some = some_.data();
    const int64_t *const outputs = y.outputs.data(), width = y.width, none = rows_, words = words_;
    const Mark *const firsts = marks.first.data(), *const others = marks.others.data();
    const int64_t* const ends = marks.end.data();
    const auto set = [=](int64_t row, const Mark& mark) {
      const int64_t at = row + mark.word;
      bits[at] |= mark.bits;
      word[at] = some[at >> 6] = 1;
    };
    for (int64_t n = 0; n < count; ++n) {
      const int64_t x = points[n].x, begin = x == 0 ? 0 : ends[x - 1], end = ends[x];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t o = outputs[points[n].y * width + j];
        const int64_t row = (o < 0 ? none : o) * words;
        set(row, firsts[x]);
        for (int64_t k = begin; k < end; ++k) set(row, others[k]);
      }
    }
  }

  // Appends the marked words, whose lines start at `line`, and clears them.
  void take(int64_t line, OutputWords* out) {
    int64_t row = 0;  // of the word at hand: words rise
    for (size_t t = 0; t < word_.size(); t += 8) {
      if (t % 64 == 0 && std::exchange(some_[t / 64], 0) == 0) {
        t += 56;
        continue;
      }
      uint64_t marked;  // eight bytes of 0 or 1
      std::memcpy(&marked, &word_[t], sizeof(marked));
      if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) marked = __builtin_bswap64(marked);
      std::memset(&word_[t], 0, sizeof(marked));
      for (; marked != 0; marked &= marked - 1) {
        const int64_t word = static_cast<int64_t>(t) + __builtin_ctzll(marked) / 8;
        const uint64_t bits = std::exchange(bits_[word], 0);
        if (word >= rows_ * words_) break;
        if (bits == 0) continue;
        if (word - row * words_ >= words_) row = word / words_;
        out->words.push_back({line + row, (word - row * words_) * 64, bits});
        out->count += count_bits(bits);
      }
    }
  }

 private:
  int64_t rows_, words_;
  std::vector<uint64_t> bits_;
  std::vector<uint8_t> word_, some_;
};

}  // namespace

template <class T>
bool bitmap_outputs(const T* coords, int64_t count, const int64_t* shape, const Reach& r,
                    OutputWords* out) {
  if (count == 0) return true;
  const int axes = 1 + r.dims;
  const int64_t most = 4 * count + 65536;  // of anything that is made for the whole box
  std::vector<int64_t> low(axes), size(axes);
  std::vector<AxisReach> reach(axes);
  const Range range = range_of(coords, count, axes);
  for (int a = 0; a < axes; ++a) {
    const int64_t least = range.low[a], greatest = range.high[a];
    constexpr int64_t kMost = int64_t{1} << 40;  // no product of two figures overflows
    if (least < -kMost || greatest > kMost) return false;
    low[a] = least;
    size[a] = greatest - least + 1;
    if (size[a] > most) return false;
    if (a == 0) continue;
    constexpr int64_t kFew = int64_t{1} << 20;
    const int s = a - 1;
    if (least < 0 || greatest >= shape[s]) return false;
    if (std::max({r.kernel[s], r.stride[s], r.padding[s], r.dilation[s]}) > kFew) return false;
    if (size[a] * r.kernel[s] > 4 * most) return false;
    reach[a] = axis_reach(r, s, low[a], size[a]);
  }
  for (int a = 1; a < axes; ++a) {
    if (reach[a].size == 0) return true;
  }
  const int last = axes - 1, middle = r.dims > 1 ? last - 1 : -1;  // of one axis: lines are slabs
  const int outer = r.dims > 1 ? axes - 2 : 1;                     // axes above a slab
  AxisReach one;
  one.low = 0, one.size = one.width = 1, one.outputs = {0};
  const AxisReach& y = middle < 0 ? one : reach[middle];
  const int64_t words = (reach[last].size + 63) / 64;
  int64_t in_slabs = 1, out_slabs = 1;
  for (int a = 0; a < outer; ++a) {
    in_slabs *= size[a];
    out_slabs *= a == 0 ? size[0] : reach[a].size;
    if (in_slabs > most || out_slabs > most) return false;
  }
  if (y.size > most || words > most || (y.size + 1) * words > most) return false;

  // Group the inputs by slab: a counting sort.
  const auto slab_of = [&](const T* row) {
    int64_t slab = 0;
    for (int a = 0; a < outer; ++a) slab = slab * size[a] + (int64_t{row[a]} - low[a]);
    return slab;
  };
  std::vector<int64_t> start(in_slabs + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++start[slab_of(coords + i * axes)];
  int64_t sum = 0;
  for (int64_t& place : start) sum += std::exchange(place, sum);
  std::unique_ptr<Point[]> points(new Point[count]);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = coords + i * axes;
    points[start[slab_of(row)]++] = {
        middle < 0 ? 0 : static_cast<int32_t>(row[middle] - low[middle]),
        static_cast<int32_t>(row[last] - low[last])};
  }  // now start[s] is where slab s ends

  // Per outer axis and output the inputs that reach it.
  std::vector<std::vector<std::vector<int64_t>>> sources(outer);
  for (int a = 1; a < outer; ++a) {
    sources[a].resize(reach[a].size);
    for (int64_t i = 0; i < size[a]; ++i) {
      for (int64_t n = 0; n < reach[a].width; ++n) {
        const int64_t o = reach[a].outputs[i * reach[a].width + n];
        if (o < 0 || (!sources[a][o].empty() && sources[a][o].back() == i)) continue;
        sources[a][o].push_back(i);
      }
    }
  }
  for (int a = 0; a < axes; ++a) {
    out->low.push_back(a == 0 ? low[0] : reach[a].low);
    out->size.push_back(a == 0 ? size[0] : reach[a].size);
  }
  const Marks marks = marks_of(reach[last], size[last]);
  Slab slab(y.size, words);
  out->words.reserve(count);
  std::vector<int64_t> inputs, next;
  for (int64_t o = 0; o < out_slabs; ++o) {
    int64_t volume = out_slabs / size[0];
    inputs = {o / volume};  // batches are their own
    for (int a = 1; a < outer; ++a) {
      volume /= reach[a].size;
      next.clear();
      for (const int64_t above : inputs) {
        for (const int64_t i : sources[a][o / volume % reach[a].size]) {
          next.push_back(above * size[a] + i);
        }
      }
      inputs.swap(next);
    }
    for (const int64_t i : inputs) {
      const int64_t begin = i == 0 ? 0 : start[i - 1];
      slab.mark(&points[begin], start[i] - begin, y, marks);
    }
    slab.take(o * y.size, out);
  }
  return true;
}

template bool bitmap_outputs(const int32_t*, int64_t, const int64_t*, const Reach&, OutputWords*);
template bool bitmap_outputs(const int64_t*, int64_t, const int64_t*, const Reach&, OutputWords*);

}  // namespace fquant
