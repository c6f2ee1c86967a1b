// Sampling where ranks share the vocabulary out: each looks at its own columns of the logits alone, and what they exchange
// is small: a row's peaks and few largest logits; the weight of its parts; how a leading set is found; the token. All ranks
// merge the same numbers and so decide the same.
//
// The result is what one rank gives for the whole row, bit for bit, because weights add up exactly in any order, and what
// is kept of a row is defined by values and ids alone. The few rows that are not sampled by parts are those of
// sample_whole.h.
//
// Floor: the passes over the part, and exchanges of a few microseconds: one if all rows are greedy or have a top_k, three to
// five for top_p; one more for the log-probability of a token.
#include "sample_ranks.h"

#include <stdexcept>

#include "sample_shares.h"
#include "sample_whole.h"

namespace fdserve {
namespace {

struct Entry {
  float logit;
  int32_t id;
};

struct Weights {
  double drawn, told;
};

struct Answer {
  int32_t token;
  float logprob;
};

// What is exchanged for a row: first its peaks, and a survey or the candidates; then the weights of all, the report of a split
// and the most probable.
constexpr int64_t PEAKS_BYTES = sizeof(Peaks), WEIGHTS_BYTES = sizeof(Weights), ENTRY_BYTES = sizeof(Entry);
static_assert(PEAKS_BYTES % 8 == 0 && WEIGHTS_BYTES % 8 == 0 && ENTRY_BYTES == 8, "each begins aligned");

class Sampling : private Shares {
 public:
  using Shares::Shares;

  // False if a peer is gone.
  bool run() { return exchange_peaks() && exchange_parts() && exchange_splits() && sample_whole(*this) && exchange_answers(); }

 private:
  int64_t num_top = 0, survey_bytes = 0;

  template <class Body>
  void for_rows(const Body& body) {
    parallel(rows, [&](int64_t i) { body(i, work[i]); });
  }

  const char* from_rank(int rank, int64_t i, int64_t bytes) const { return part(shared, rank) + i * bytes; }

  Reports reports_at(int64_t i, int64_t bytes, int64_t offset) const {
    Reports reports;
    for (int rank = 0; rank < shared.ranks; ++rank)
      reports.push_back(reinterpret_cast<const Report*>(from_rank(rank, i, bytes) + offset));
    return reports;
  }

  // -- the peaks, and from them what is to be done --------------------------------------------------------------------

  bool exchange_peaks() {
    int64_t max_candidates = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (draw_of(i) == Draw::kNucleus) survey_bytes = report_bytes(shared.ranks);
      max_candidates = std::max(max_candidates, candidates(i));
    }
    const int64_t entries = PEAKS_BYTES + survey_bytes, bytes = entries + max_candidates * ENTRY_BYTES;
    char* to = room(shared);
    for_rows([&](int64_t i, const Work&) { first_look(i, to + i * bytes, entries); });
    if (!meet(shared, rows * bytes)) return false;
    for_rows([&](int64_t i, Work& row) {
      for (int rank = 0; rank < shared.ranks; ++rank)
        add_peaks(*reinterpret_cast<const Peaks*>(from_rank(rank, i, bytes)), row.peaks);
      decide(i);
      if (row.draw == Draw::kFew)
        row.token = static_cast<int32_t>(row_of(i).draw_few(merged(i, bytes, entries, candidates(i)), drawn(i)));
      if (row.draw == Draw::kNucleus)
        row.search = std::make_unique<LeadingSearch>(drawn(i), row_of(i).goal(drawn(i)), reports_at(i, bytes, PEAKS_BYTES));
    });
    for (const Work& row : work)
      if (row.logprobs && !row.whole) num_top = whole.num_top;
    return true;
  }

  // All that needs nothing but the part, while it is in the cache.
  void first_look(int64_t i, char* to, int64_t entries) const {
    Row row = part_of(i);
    const float* changed = row.processed();
    const float* logits = changed ? changed : row.logits();
    Peaks& peaks = *reinterpret_cast<Peaks*>(to);
    peaks = peaks_of(i, row.logits(), changed);
    if (draw_of(i) == Draw::kNucleus)
      Part::survey(logits, mine.vocab_size, shared.ranks, reinterpret_cast<Report*>(to + PEAKS_BYTES));
    if (candidates(i) > 0 && !peaks.processed_nan && peaks.processed < INF)
      put(largest(logits, mine.vocab_size, candidates(i)), reinterpret_cast<Entry*>(to + entries));
  }

  // -- the parts' weights, first splits and most probable ---------------------------------------------------------------

  bool exchange_parts() {
    bool needed = false;
    for (const Work& row : work) needed |= !row.whole && (needs_weight(row) || row.logprobs);
    if (!needed) return true;
    const int64_t bytes = WEIGHTS_BYTES + survey_bytes + num_top * ENTRY_BYTES;
    char* to = room(shared);
    for_rows([&](int64_t i, const Work& row) {
      if (!row.whole) fill_part(i, to + i * bytes);
    });
    if (!meet(shared, rows * bytes)) return false;
    for_rows([&](int64_t i, const Work& row) {
      if (!row.whole) merge(i, bytes);
    });
    return true;
  }

  static bool needs_weight(const Work& row) { return row.draw == Draw::kPlain || row.draw == Draw::kNucleus; }

  void fill_part(int64_t i, char* to) {
    Work& todo = work[i];
    Row row = part_of(i);
    Weights& weights = *reinterpret_cast<Weights*>(to);
    Report* report = reinterpret_cast<Report*>(to + WEIGHTS_BYTES);
    Entry* entries = reinterpret_cast<Entry*>(to + WEIGHTS_BYTES + survey_bytes);
    if (needs_weight(todo)) {
      const float* changed = row.processed();
      const float* logits = changed ? changed : row.logits();
      if (todo.draw == Draw::kPlain) weights.drawn = todo.part.weigh(logits, mine.vocab_size, drawn(i));
      if (todo.draw == Draw::kNucleus) split(i, logits, report), weights.drawn = report->split.all;
    }
    if (!todo.logprobs) return;
    weights.told = told_is_drawn(i) ? weights.drawn : Part().weigh(row.logits(), mine.vocab_size, told(i));
    put(largest(row.logits(), mine.vocab_size, num_top), entries);
  }

  // Whether the weight of all of the distribution that is drawn from is that of the one that is told.
  bool told_is_drawn(int64_t i) const {
    return needs_weight(work[i]) && !row_of(i).is_changed() && told(i).inverse == drawn(i).inverse;
  }

  void split(int64_t i, const float* logits, Report* report) {
    const LeadingSearch& search = *work[i].search;
    work[i].part.split(logits, mine.vocab_size, drawn(i), search.from, search.until, shared.ranks, report);
  }

  void put(const std::vector<Candidate>& from, Entry* to) const {
    for (const Candidate& each : from) *to++ = {each.logit, each.id + static_cast<int32_t>(mine.first_id)};
  }

  void merge(int64_t i, int64_t bytes) {
    Work& row = work[i];
    const auto weights = [&](int rank) { return *reinterpret_cast<const Weights*>(from_rank(rank, i, bytes)); };
    double drawn_total = 0, told_total = 0;
    for (int rank = 0; rank < shared.ranks; ++rank) drawn_total += weights(rank).drawn, told_total += weights(rank).told;
    if (row.draw == Draw::kPlain) {
      find_owner(i, drawn_total, [&](int rank) { return weights(rank).drawn; });
    } else if (row.draw == Draw::kNucleus) {
      take_reports(i, reports_at(i, bytes, WEIGHTS_BYTES));
    }
    if (!row.logprobs) return;
    if (!needs_weight(row) && row.token >= 0 && row.token < whole.vocab_size) row.owner = owner_of(row.token);
    row.log_total = std::log(told_total);
    const std::vector<Candidate> top = merged(i, bytes, WEIGHTS_BYTES + survey_bytes, num_top);
    for (size_t k = 0; k < top.size(); ++k) {
      const int64_t at = (begin + i) * whole.num_top + static_cast<int64_t>(k);
      whole.top_ids[at] = top[k].id;
      whole.top_logprobs[at] = logprob(i, top[k].logit);
    }
  }

  // The first `count` of all ranks' entries in order, of which each has put its own first `count`.
  std::vector<Candidate> merged(int64_t i, int64_t bytes, int64_t offset, int64_t count) const {
    std::vector<Candidate> all;
    for (int rank = 0; rank < shared.ranks; ++rank) {
      const Entry* entries = reinterpret_cast<const Entry*>(from_rank(rank, i, bytes) + offset);
      const auto merged = static_cast<int64_t>(all.size());
      for (int64_t k = 0; k < std::min(count, width(rank)); ++k) all.push_back({entries[k].logit, 0, entries[k].id});
      std::inplace_merge(all.begin(), all.begin() + merged, all.end(), before);
    }
    if (static_cast<int64_t>(all.size()) > count) all.resize(static_cast<size_t>(count));
    return all;
  }

  // Whose part the running weight passes the target in, and by how much it must in there.
  template <class WeightOf>
  void find_owner(int64_t i, double total, const WeightOf& weight_of) {
    Work& row = work[i];
    row.target = row_of(i).target(total);
    for (row.owner = 0; weight_of(row.owner) <= row.target; ++row.owner) row.target -= weight_of(row.owner);
  }

  // -- leading sets -----------------------------------------------------------------------------------------------------

  void take_reports(int64_t i, const Reports& reports) {
    Work& row = work[i];
    if (row.search->take(reports)) row.part.accept();
    if (row.search->done())
      find_owner(i, row.search->leading().weight, [&](int rank) { return row.search->leading(rank).weight; });
  }

  // Further splits of the rows whose leading set is not found yet.
  bool exchange_splits() {
    std::vector<int64_t> left(rows);
    for (int64_t i = 0; i < rows; ++i) left[i] = i;
    while (true) {
      left.erase(std::remove_if(left.begin(), left.end(), [&](int64_t i) { return !work[i].search || work[i].search->done(); }),
                 left.end());
      if (left.empty()) return true;
      const int64_t count = static_cast<int64_t>(left.size());
      char* to = room(shared);
      parallel(count, [&](int64_t k) {
        Row row = part_of(left[k]);
        const float* changed = work[left[k]].part.needs_row() ? row.processed() : nullptr;
        split(left[k], changed ? changed : row.logits(), reinterpret_cast<Report*>(to + k * survey_bytes));
      });
      if (!meet(shared, count * survey_bytes)) return false;
      parallel(count, [&](int64_t k) { take_reports(left[k], reports_at(k, survey_bytes, 0)); });
    }
  }

  // -- the tokens -------------------------------------------------------------------------------------------------------

  // A row's answer, and for a whole one the most probable ids and their logprobs.
  int64_t answer_bytes() const { return 8 + 8 * whole.num_top; }

  bool exchange_answers() {
    bool needed = false;
    for (const Work& row : work) needed |= row.owner >= 0;
    if (needed) {
      char* to = room(shared);
      for_rows([&](int64_t i, const Work& row) {
        if (row.owner == shared.rank) give_answer(i, to + i * answer_bytes());
      });
      if (!meet(shared, rows * answer_bytes())) return false;
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (work[i].owner >= 0)
        take_answer(i, from_rank(work[i].owner, i, answer_bytes()));
      else
        whole.tokens[begin + i] = work[i].token;
    }
    return true;
  }

  void give_answer(int64_t i, char* to) const {
    Answer answer = {work[i].token, NOT_A_NUMBER};
    if (work[i].whole) {
      answer = {whole.tokens[begin + i], whole.logprobs[begin + i]};
      const size_t bytes = static_cast<size_t>(whole.num_top) * 4;
      std::memcpy(to + 8, whole.top_ids + (begin + i) * whole.num_top, bytes);
      std::memcpy(to + 8 + bytes, whole.top_logprobs + (begin + i) * whole.num_top, bytes);
    } else {
      Row row = part_of(i);
      if (needs_weight(work[i])) answer.token = picked(i, row);
      if (work[i].logprobs) answer.logprob = logprob(i, row.logits()[answer.token - mine.first_id]);
    }
    std::memcpy(to, &answer, sizeof(answer));
  }

  int32_t picked(int64_t i, Row& row) const {
    const float* changed = row.processed();
    const Leading leading = work[i].search ? work[i].search->leading(shared.rank) : Leading{};
    return static_cast<int32_t>(mine.first_id + work[i].part.pick(changed ? changed : row.logits(), mine.vocab_size, drawn(i),
                                                                  leading, work[i].target));
  }

  void take_answer(int64_t i, const char* from) const {
    Answer answer;
    std::memcpy(&answer, from, sizeof(answer));
    whole.tokens[begin + i] = answer.token;
    whole.logprobs[begin + i] = answer.logprob;
    if (!work[i].whole) return;
    const size_t bytes = static_cast<size_t>(whole.num_top) * 4;
    std::memcpy(whole.top_ids + (begin + i) * whole.num_top, from + 8, bytes);
    std::memcpy(whole.top_logprobs + (begin + i) * whole.num_top, from + 8 + bytes, bytes);
  }
};

}  // namespace

bool sample_ranks(const SampleCall& call, const Shared& shared, const int64_t* starts) {
  std::fill(call.logprobs, call.logprobs + call.rows, NOT_A_NUMBER);
  std::fill(call.top_ids, call.top_ids + call.rows * call.num_top, -1);
  std::fill(call.top_logprobs, call.top_logprobs + call.rows * call.num_top, NOT_A_NUMBER);
  const int64_t part = WEIGHTS_BYTES + report_bytes(shared.ranks) + (std::min(call.num_top, FEW) + FEW) * ENTRY_BYTES;
  const int64_t fits = shared.slot_bytes / std::max(part, 8 + 8 * call.num_top);
  if (fits == 0) throw std::invalid_argument("a slot must hold what is exchanged for a row");
  for (int64_t begin = 0; begin < call.rows; begin += fits)
    if (!Sampling(call, shared, starts, begin, std::min(call.rows, begin + fits)).run()) return false;
  return true;
}

}  // namespace fdserve
