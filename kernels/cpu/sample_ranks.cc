// Sampling where ranks share the vocabulary out: each looks at its own columns of the logits alone, and what they exchange
// is small: a row's peaks; its sums of exponentials by blocks and its few largest logits; the token. All ranks merge the
// same numbers and so decide the same.
//
// The result is what one rank gives for the whole row, bit for bit. Shards begin where blocks of sums do, so the sums are
// the same; where one rank walks the whole row in another order (top_p and min_p without top_k), a decision is taken from
// the candidates only if rounding cannot change it. What the candidates do not decide (a wide nucleus, say) is decided by
// one of the ranks on the whole row: they exchange the columns of that row, and take such rows in turns.
//
// Floor: the passes over the shard, and two to four exchanges of a few microseconds.
#include "sample_ranks.h"

#include <stdexcept>

#include "sample_row.h"

namespace fdserve {
namespace {

constexpr int64_t NUCLEUS_CANDIDATES = 64;  // from each rank, for a row with top_p or min_p
// Beyond what the sums of one row in two orders can differ by: each block's is of 1024 floats, added in many lanes.
constexpr double ROUNDING = 1e-5;

struct Peaks {
  float raw, processed;
  int32_t first;  // id of the processed logits' peak
  bool raw_nan, processed_nan;
};

struct Entry {
  float logit;
  int32_t id;
};

struct Answer {
  int32_t token;
  float logprob;
};

enum class Draw { kNone, kFew, kPlain, kNucleus };

// What is to be done for a row; the same on every rank.
struct Work {
  Peaks peaks = {-INF, -INF, -1, false, false};
  Draw draw = Draw::kNone;
  bool logprobs = false;
  bool whole = false;     // on the gathered row
  int64_t candidates = 0;
  int32_t token = BROKEN;
  int owner = -1;         // the rank that answers for the row, -1 if none needs to
  int64_t block = 0;      // of the owner's shard, where the token of a plain draw is
  double target = 0;      // what the running sum must pass within it
  double log_total = 0;
};

class Sampling {
 public:
  Sampling(const SampleCall& call, const Shared& shared, const int64_t* starts, int64_t begin, int64_t end)
      : whole(call), part_call(call), shared(shared), starts(starts), begin(begin), rows(end - begin), work(rows) {
    part_call.first_id = starts[shared.rank];
    part_call.vocab_size = starts[shared.rank + 1] - starts[shared.rank];
    for (int rank = 0; rank < shared.ranks; ++rank) widest = std::max(widest, starts[rank + 1] - starts[rank]);
    max_blocks = (widest + SUM_BLOCK - 1) / SUM_BLOCK;
  }

  // False if a peer is gone.
  bool run() {
    if (!blocks_are_whole()) {
      for (Work& row : work) row.whole = true;
    } else if (!exchange_peaks() || !exchange_parts()) {
      return false;
    }
    return gather() && exchange_answers();
  }

 private:
  const SampleCall& whole;  // its logits are the shard's
  SampleCall part_call;     // of the shard alone
  const Shared& shared;
  const int64_t* starts;
  const int64_t begin, rows;
  int64_t widest = 0, max_blocks = 0, max_candidates = 0, num_top = 0;
  std::vector<Work> work;

  const float* params(int64_t row) const { return whole.float_params + (begin + row) * 6; }
  const int64_t* ints(int64_t row) const { return whole.int_params + (begin + row) * 4; }
  int32_t mode(int64_t row) const { return whole.logprob_modes == nullptr ? 0 : whole.logprob_modes[begin + row]; }
  int64_t width(int rank) const { return starts[rank + 1] - starts[rank]; }
  int owner_of(int64_t id) const {
    int rank = 0;
    while (id >= starts[rank + 1]) ++rank;
    return rank;
  }

  bool blocks_are_whole() const {
    for (int rank = 1; rank < shared.ranks; ++rank)
      if (starts[rank] % SUM_BLOCK != 0 || width(rank) == 0) return false;
    return width(0) > 0;
  }

  // -- the peaks, and from them what is to be done --------------------------------------------------------------------

  bool exchange_peaks() {
    Peaks* mine = reinterpret_cast<Peaks*>(room(shared));
    parallel(rows, [&](int64_t i) {
      Row row(part_call, begin + i);
      Peaks peaks = {};
      peaks.raw = peak_of(row.logits(), &peaks.raw_nan);
      const float* changed = row.processed();
      peaks.processed = changed ? peak_of(changed, &peaks.processed_nan) : peaks.raw;
      if (changed == nullptr) peaks.processed_nan = peaks.raw_nan;
      int32_t first = 0;
      float_kernels().at_least(changed ? changed : row.logits(), part_call.vocab_size, peaks.processed, &first, 1);
      peaks.first = first + static_cast<int32_t>(part_call.first_id);
      mine[i] = peaks;
    });
    if (!meet(shared, rows * static_cast<int64_t>(sizeof(Peaks)))) return false;
    for (int rank = 0; rank < shared.ranks; ++rank) {
      const Peaks* theirs = reinterpret_cast<const Peaks*>(part(shared, rank));
      for (int64_t i = 0; i < rows; ++i) {
        Peaks& all = work[i].peaks;
        all.raw = std::max(all.raw, theirs[i].raw);
        all.raw_nan |= theirs[i].raw_nan;
        all.processed_nan |= theirs[i].processed_nan;
        if (theirs[i].processed > all.processed || all.first < 0)
          all.processed = theirs[i].processed, all.first = theirs[i].first;
      }
    }
    for (int64_t i = 0; i < rows; ++i) decide(i);
    return true;
  }

  float peak_of(const float* logits, bool* has_nan) const {
    return float_kernels().peak(logits, part_call.vocab_size, has_nan);
  }

  void decide(int64_t i) {
    Work& row = work[i];
    const Peaks& peaks = row.peaks;
    if (peaks.raw_nan || !std::isfinite(peaks.raw)) return;
    row.logprobs = mode(i) >= 0;
    row.whole = row.logprobs && (((mode(i) & TOP_P_NORMALIZED) != 0 && params(i)[1] < 1) || whole.num_top > HEAP_LIMIT);
    if (row.logprobs && !row.whole) num_top = whole.num_top;
    const int64_t top_k = ints(i)[0] <= 0 || ints(i)[0] >= whole.vocab_size ? 0 : ints(i)[0];
    if (ints(i)[3] >= 0) {
      row.token = static_cast<int32_t>(ints(i)[3]);
    } else if (peaks.processed == -INF && !peaks.processed_nan) {
      row.token = NOTHING_ALLOWED;
    } else if (peaks.processed_nan || !std::isfinite(peaks.processed)) {
      row.token = BROKEN;
    } else if (!(params(i)[0] >= GREEDY_TEMPERATURE)) {
      row.token = peaks.first;
    } else if (top_k > HEAP_LIMIT) {
      row.whole = true;
    } else if (top_k > 0) {
      row.draw = Draw::kFew, row.candidates = top_k;
    } else if (params(i)[1] < 1 || params(i)[2] > 0) {
      row.draw = Draw::kNucleus, row.candidates = NUCLEUS_CANDIDATES;
    } else {
      row.draw = Draw::kPlain;
    }
    if (!row.whole) max_candidates = std::max(max_candidates, row.candidates);
  }

  float draw_inverse(int64_t i) const { return 1.0f / params(i)[0]; }
  float logprob_inverse(int64_t i) const {
    return (mode(i) & TEMPERATURE_SCALED) != 0 && params(i)[0] >= GREEDY_TEMPERATURE ? 1.0f / params(i)[0] : 1.0f;
  }

  // -- sums and candidates --------------------------------------------------------------------------------------------

  // A row's part: sums for the draw and for logprobs, candidates, the most probable.
  int64_t part_bytes() const { return max_blocks * 16 + (max_candidates + num_top) * 8; }
  template <class Bytes>
  Bytes* sums_in(Bytes* data, int64_t i) const { return data + i * part_bytes(); }
  template <class Bytes>
  Bytes* entries_in(Bytes* data, int64_t i) const { return sums_in(data, i) + max_blocks * 16; }

  bool exchange_parts() {
    bool needed = false;
    for (const Work& row : work) needed |= !row.whole && (row.draw != Draw::kNone || row.logprobs);
    if (!needed) return true;
    char* mine = room(shared);
    parallel(rows, [&](int64_t i) {
      if (!work[i].whole) fill_part(i, reinterpret_cast<double*>(sums_in(mine, i)),
                                    reinterpret_cast<Entry*>(entries_in(mine, i)));
    });
    if (!meet(shared, rows * part_bytes())) return false;
    parallel(rows, [&](int64_t i) {
      if (!work[i].whole) merge(i);
    });
    return true;
  }

  void fill_part(int64_t i, double* sums, Entry* entries) const {
    const Work& todo = work[i];
    Row row(part_call, begin + i);
    if (todo.draw != Draw::kNone) {
      const float* changed = row.processed();
      const float* logits = changed ? changed : row.logits();
      if (todo.draw != Draw::kFew) {
        row.weigh(logits, todo.peaks.processed, draw_inverse(i), nullptr);
        std::copy(row.block_sums().begin(), row.block_sums().end(), sums);
      }
      put(row.largest(logits, todo.candidates), entries);
    }
    if (todo.logprobs) {
      row.weigh(row.logits(), todo.peaks.raw, logprob_inverse(i), nullptr);
      std::copy(row.block_sums().begin(), row.block_sums().end(), sums + max_blocks);
      put(row.largest(row.logits(), num_top), entries + max_candidates);
    }
  }

  void put(const std::vector<Candidate>& from, Entry* to) const {
    for (const Candidate& each : from) *to++ = {each.logit, each.id + static_cast<int32_t>(part_call.first_id)};
  }

  void merge(int64_t i) {
    Work& row = work[i];
    if (row.draw == Draw::kFew) {
      int64_t certain;
      row.token = static_cast<int32_t>(Row(whole, begin + i).draw_few(
          merged(i, 0, row.candidates, row.candidates, &certain), row.peaks.processed, draw_inverse(i), number(i)));
    } else if (row.draw == Draw::kPlain) {
      find_block(i);
    } else if (row.draw == Draw::kNucleus) {
      row.token = draw_nucleus(i);
      row.whole = row.token < 0;
    }
    if (row.whole) return;
    if (row.draw != Draw::kPlain && row.logprobs && row.token >= 0 && row.token < whole.vocab_size)
      row.owner = owner_of(row.token);
    if (!row.logprobs) return;
    row.log_total = std::log(total_of(i, max_blocks));
    int64_t certain;
    const std::vector<Candidate> top = merged(i, max_candidates, num_top, num_top, &certain);
    for (size_t k = 0; k < top.size(); ++k) {
      const int64_t at = (begin + i) * whole.num_top + static_cast<int64_t>(k);
      whole.top_ids[at] = top[k].id;
      whole.top_logprobs[at] = logprob(i, top[k].logit);
    }
  }

  double number(int64_t i) const { return Row(whole, begin + i).number(); }

  float logprob(int64_t i, float logit) const {
    return static_cast<float>((double{logit} - work[i].peaks.raw) * logprob_inverse(i) - work[i].log_total);
  }

  const double* sums_of(int rank, int64_t i, int64_t offset) const {
    return reinterpret_cast<const double*>(sums_in(part(shared, rank), i)) + offset;
  }
  int64_t blocks(int rank) const { return (width(rank) + SUM_BLOCK - 1) / SUM_BLOCK; }

  // In the order of the blocks, as for a whole row.
  double total_of(int64_t i, int64_t offset) const {
    double total = 0;
    for (int rank = 0; rank < shared.ranks; ++rank)
      for (int64_t block = 0; block < blocks(rank); ++block) total += sums_of(rank, i, offset)[block];
    return total;
  }

  // The first `limit` of all ranks' `count` entries in order. `certain`: how many of them no id that was not sent precedes.
  std::vector<Candidate> merged(int64_t i, int64_t offset, int64_t count, int64_t limit, int64_t* certain) const {
    std::vector<Candidate> all;
    Candidate bar = {-INF, 0, std::numeric_limits<int32_t>::max()};  // the first that is the last of a rank's
    for (int rank = 0; rank < shared.ranks; ++rank) {
      const Entry* entries = reinterpret_cast<const Entry*>(entries_in(part(shared, rank), i)) + offset;
      const int64_t sent = std::min(count, width(rank));
      for (int64_t k = 0; k < sent; ++k) all.push_back({entries[k].logit, 0, entries[k].id});
      if (sent > 0 && sent < width(rank) && before(all.back(), bar)) bar = all.back();
    }
    std::sort(all.begin(), all.end(), before);
    if (static_cast<int64_t>(all.size()) > limit) all.resize(static_cast<size_t>(limit));
    *certain = std::count_if(all.begin(), all.end(), [&](const Candidate& each) { return !before(bar, each); });
    return all;
  }

  // A draw from all ids: the block in which the running sum passes the target, and who has it.
  void find_block(int64_t i) {
    Work& row = work[i];
    int64_t last = 0;
    for (int rank = 0; rank < shared.ranks; ++rank) last += blocks(rank);
    std::vector<double> sums;
    for (int rank = 0; rank < shared.ranks; ++rank)
      sums.insert(sums.end(), sums_of(rank, i, 0), sums_of(rank, i, 0) + blocks(rank));
    double target = number(i) * total_of(i, 0);
    int64_t block = 0;
    while (block + 1 < last && sums[static_cast<size_t>(block)] <= target) target -= sums[static_cast<size_t>(block++)];
    // Rounding may lead past the last id that has any weight.
    while (block > 0 && sums[static_cast<size_t>(block)] == 0) --block, target = INF;
    row.target = target;
    for (row.owner = 0; block >= blocks(row.owner); ++row.owner) block -= blocks(row.owner);
    row.block = block;
  }

  // A draw from what top_p and min_p leave, -1 if the candidates do not settle it.
  int32_t draw_nucleus(int64_t i) const {
    const float top_p = params(i)[1], min_p = std::min(params(i)[2], 1.0f);
    int64_t certain;
    std::vector<Candidate> kept =
        merged(i, 0, work[i].candidates, std::numeric_limits<int64_t>::max(), &certain);
    kept.resize(static_cast<size_t>(certain));
    std::vector<float> weights;
    for (const Candidate& each : kept) weights.push_back(each.logit);
    float_kernels().exps(weights.data(), certain, work[i].peaks.processed, draw_inverse(i), weights.data());
    const double total = total_of(i, 0), needed = top_p * total, slack = ROUNDING * total;
    int64_t count = 0;
    double reached = 0;
    bool settled = certain == whole.vocab_size && !(top_p < 1);
    for (; count < certain && !settled; ++count) {
      if (top_p < 1 && reached >= needed) break;
      if (weights[static_cast<size_t>(count)] < min_p) { settled = true; break; }
      if (top_p < 1 && count > 0 && reached > needed - slack) return -1;
      reached += weights[static_cast<size_t>(count)];
    }
    if (top_p < 1 && reached >= needed) {
      if (reached < needed + slack) return -1;
      settled = true;
    }
    if (!settled) return -1;
    if (certain == whole.vocab_size && !(top_p < 1)) count = certain;
    return draw_kept(kept, weights, count, min_p, number(i));
  }

  // By id among the first `count`, -1 if rounding may decide.
  static int32_t draw_kept(std::vector<Candidate>& kept, const std::vector<float>& weights, int64_t count, float min_p,
                           double u) {
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
      Candidate& each = kept[static_cast<size_t>(k)];
      each.weight = weights[static_cast<size_t>(k)] >= min_p ? weights[static_cast<size_t>(k)] : 0;
      total += each.weight;
    }
    kept.resize(static_cast<size_t>(count));
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    double reached = 0;
    for (const Candidate& each : kept) {
      if (each.weight > 0 && reached > u * total - ROUNDING * total && reached > 0) return -1;
      reached += each.weight;
      if (reached > u * total) return reached > (u + ROUNDING) * total ? each.id : -1;
    }
    return -1;
  }

  // -- rows that the candidates do not settle -------------------------------------------------------------------------

  bool gather() {
    std::vector<int64_t> gathered;
    for (int64_t i = 0; i < rows; ++i)
      if (work[i].whole) work[i].owner = static_cast<int>(gathered.size()) % shared.ranks, gathered.push_back(i);
    const int64_t count = static_cast<int64_t>(gathered.size()), fits = shared.slot_bytes / (widest * 4);
    if (count > 0 && fits == 0) throw std::invalid_argument("a slot must hold a rank's part of a row of logits");
    for (int64_t from = 0; from < count; from += fits) {
      const int64_t to = std::min(count, from + fits);
      for (int64_t k = from; k < to; ++k)
        std::memcpy(room(shared) + (k - from) * widest * 4, Row(part_call, begin + gathered[k]).logits(),
                    static_cast<size_t>(part_call.vocab_size) * 4);
      if (!meet(shared, (to - from) * widest * 4)) return false;
      parallel(to - from, [&](int64_t k) {
        if (work[gathered[from + k]].owner == shared.rank) sample_whole(gathered[from + k], k);
      });
    }
    return true;
  }

  void sample_whole(int64_t i, int64_t place) const {
    float* logits = scratch<float>(kScratchCall, whole.vocab_size);
    for (int rank = 0; rank < shared.ranks; ++rank)
      std::memcpy(logits + starts[rank], part(shared, rank) + place * widest * 4, static_cast<size_t>(width(rank)) * 4);
    Row(whole, begin + i, logits).run();
  }

  // -- the tokens -----------------------------------------------------------------------------------------------------

  // A row's answer, and for a gathered one the most probable ids and their logprobs.
  int64_t answer_bytes() const { return 8 + 8 * whole.num_top; }

  bool exchange_answers() {
    bool needed = false;
    for (const Work& row : work) needed |= row.owner >= 0;
    if (needed) {
      for (int64_t i = 0; i < rows; ++i)
        if (work[i].owner == shared.rank) give_answer(i, room(shared) + i * answer_bytes());
      if (!meet(shared, rows * answer_bytes())) return false;
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (work[i].owner >= 0) {
        take_answer(i, part(shared, work[i].owner) + i * answer_bytes());
      } else {
        whole.tokens[begin + i] = work[i].token;
      }
    }
    return true;
  }

  void give_answer(int64_t i, char* to) const {
    Answer answer = {work[i].token, NOT_A_NUMBER};
    if (work[i].whole) {
      answer = {whole.tokens[begin + i], whole.logprobs[begin + i]};
      std::memcpy(to + 8, whole.top_ids + (begin + i) * whole.num_top, static_cast<size_t>(whole.num_top) * 4);
      std::memcpy(to + 8 + 4 * whole.num_top, whole.top_logprobs + (begin + i) * whole.num_top,
                  static_cast<size_t>(whole.num_top) * 4);
    } else {
      Row row(part_call, begin + i);
      if (work[i].draw == Draw::kPlain) {
        const float* changed = row.processed();
        answer.token = static_cast<int32_t>(part_call.first_id + row.pick_from(
            work[i].block, changed ? changed : row.logits(), work[i].peaks.processed, draw_inverse(i), nullptr, {},
            work[i].target));
      }
      if (work[i].logprobs) answer.logprob = logprob(i, row.logits()[answer.token - part_call.first_id]);
    }
    std::memcpy(to, &answer, sizeof(answer));
  }

  void take_answer(int64_t i, const char* from) const {
    Answer answer;
    std::memcpy(&answer, from, sizeof(answer));
    whole.tokens[begin + i] = answer.token;
    whole.logprobs[begin + i] = answer.logprob;
    if (!work[i].whole) return;
    std::memcpy(whole.top_ids + (begin + i) * whole.num_top, from + 8, static_cast<size_t>(whole.num_top) * 4);
    std::memcpy(whole.top_logprobs + (begin + i) * whole.num_top, from + 8 + 4 * whole.num_top,
                static_cast<size_t>(whole.num_top) * 4);
  }
};

}  // namespace

bool sample_ranks(const SampleCall& call, const Shared& shared, const int64_t* starts) {
  std::fill(call.logprobs, call.logprobs + call.rows, NOT_A_NUMBER);
  std::fill(call.top_ids, call.top_ids + call.rows * call.num_top, -1);
  std::fill(call.top_logprobs, call.top_logprobs + call.rows * call.num_top, NOT_A_NUMBER);
  int64_t widest = 0;
  for (int rank = 0; rank < shared.ranks; ++rank) widest = std::max(widest, starts[rank + 1] - starts[rank]);
  const int64_t blocks = (widest + SUM_BLOCK - 1) / SUM_BLOCK;
  const int64_t part = blocks * 16 + (std::min(call.num_top, HEAP_LIMIT) + HEAP_LIMIT) * 8;
  const int64_t bytes = std::max(part, 8 + 8 * call.num_top);
  const int64_t fits = shared.slot_bytes / bytes;
  if (fits == 0) throw std::invalid_argument("a slot must hold what is exchanged for a row");
  for (int64_t begin = 0; begin < call.rows; begin += fits)
    if (!Sampling(call, shared, starts, begin, std::min(call.rows, begin + fits)).run()) return false;
  return true;
}

}  // namespace fdserve
