// mma.sync and ldmatrix, lane by lane as the PTX ISA lays their fragments out.
//
// Products are exact in double, their sum and the addend are added up in double in order of k and rounded once to the
// type of the result. Hardware adds in another order with fewer bits: last bits differ, and are not shown.
// An undefined element of A spoils its row, one of B its column, one of C itself.
#include <cstring>

#include "engine/access.h"
#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

constexpr int kM = 16, kN = 8;

enum Element : uint8_t { kHalf, kBFloat, kTf32, kDouble };

struct Tile {
  double a[kM][16];
  double b[16][kN];
  double c[kM][kN];
  bool any_bad = false;  // any of these
  bool bad_row[kM] = {};
  bool bad_column[kN] = {};
  bool bad[kM][kN] = {};
};

// Tensor cores read the upper 19 bits of a tf32.
float tf32_element(uint32_t bits) { return as_float(bits & 0xffffe000u); }

// list: d, a, b, c in order; imm: k; mode: type of A and B; flag: C and D are float16.
int num_a(const Instr& in) {
  return in.mode == kDouble ? 1 : in.mode == kTf32 ? (in.imm == 8 ? 4 : 2) : (in.imm == 16 ? 4 : 2);
}
int num_b(const Instr& in) { return in.mode == kDouble ? 1 : num_a(in) / 2; }
int num_c(const Instr& in) { return in.flag || in.mode == kDouble ? 2 : 4; }
int rows_of(const Instr& in) { return in.mode == kDouble ? 8 : kM; }

// The registers of one 8 x 8 part of 16-bit elements are its rows, one after the other.
template <class Place>
void gather_halves(const Context& c, const Instr& in, const Operand& reg, const Place& place) {
  const uint16_t* bits = source<uint16_t>(c, reg);
  float part[64];
  if (in.mode == kBFloat) {
    for (int i = 0; i < 64; ++i) part[i] = from_bfloat(bits[i]);
  } else {
    for (int i = 0; i < 64; ++i) part[i] = from_half(bits[i]);
  }
  for (int row = 0; row < 8; ++row) {
    for (int column = 0; column < 8; ++column) place(row, column) = part[8 * row + column];
  }
}

void gather_a(const Context& c, const Instr& in, const Operand* regs, Tile& tile) {
  for (int r = 0; r < num_a(in); ++r) {
    const int low_row = (r % 2) * 8;
    each_lane(undefined_lanes(c, regs[r]), [&](int l) { tile.bad_row[l / 4 + low_row] = true; });
    if (in.mode == kDouble) {
      for (int l = 0; l < kLanes; ++l) tile.a[l / 4][l % 4] = source<double>(c, regs[r])[l];
    } else if (in.mode == kTf32) {
      for (int l = 0; l < kLanes; ++l)
        tile.a[l / 4 + low_row][l % 4 + (r / 2) * 4] = tf32_element(source<uint32_t>(c, regs[r])[l]);
    } else {
      gather_halves(c, in, regs[r], [&](int row, int k) -> double& { return tile.a[row + low_row][k + (r / 2) * 8]; });
    }
  }
}

void gather_b(const Context& c, const Instr& in, const Operand* regs, Tile& tile) {
  for (int r = 0; r < num_b(in); ++r) {
    each_lane(undefined_lanes(c, regs[r]), [&](int l) { tile.bad_column[l / 4] = true; });
    if (in.mode == kDouble) {
      for (int l = 0; l < kLanes; ++l) tile.b[l % 4][l / 4] = source<double>(c, regs[r])[l];
    } else if (in.mode == kTf32) {
      for (int l = 0; l < kLanes; ++l) tile.b[l % 4 + r * 4][l / 4] = tf32_element(source<uint32_t>(c, regs[r])[l]);
    } else {
      gather_halves(c, in, regs[r], [&](int column, int k) -> double& { return tile.b[k + r * 8][column]; });
    }
  }
}

// Element i of lane l of C and D.
int row_of(const Instr& in, int l, int i) { return in.mode == kDouble ? l / 4 : l / 4 + (i / 2) * 8; }
int column_of(int l, int i) { return l % 4 * 2 + i % 2; }

void gather_c(const Context& c, const Instr& in, const Operand* regs, Tile& tile) {
  if (!in.flag && in.mode != kDouble) {
    for (int r = 0; r < 4; ++r) {
      const float* from = source<float>(c, regs[r]);
      for (int l = 0; l < kLanes; ++l) tile.c[l / 4 + (r / 2) * 8][l % 4 * 2 + r % 2] = from[l];
      each_lane(undefined_lanes(c, regs[r]), [&](int l) { tile.bad[row_of(in, l, r)][column_of(l, r)] = true; });
    }
    return;
  }
  for (int r = 0; r < num_c(in); ++r) {
    const uint32_t undefined = undefined_lanes(c, regs[r]);
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < (in.flag ? 2 : 1); ++i) {
        const int element = in.flag ? 2 * r + i : r;
        const int row = row_of(in, l, element), column = column_of(l, element);
        double value;
        if (in.flag) {
          value = from_half(static_cast<uint16_t>(source<uint32_t>(c, regs[r])[l] >> (16 * i)));
        } else {
          value = in.mode == kDouble ? source<double>(c, regs[r])[l] : source<float>(c, regs[r])[l];
        }
        tile.c[row][column] = value;
        tile.bad[row][column] = (undefined >> l & 1) != 0;
      }
    }
  }
}

void scatter_d(const Context& c, const Instr& in, const Operand* regs, const Tile& tile) {
  if (!in.flag && in.mode != kDouble && !tile.any_bad) {
    for (int r = 0; r < 4; ++r) {
      float* to = destination<float>(c, regs[r]);
      for (int l = 0; l < kLanes; ++l)
        to[l] = canonical(static_cast<float>(tile.c[l / 4 + (r / 2) * 8][l % 4 * 2 + r % 2]));
      set_undefined(c, regs[r], 0, kAllLanes);
    }
    return;
  }
  for (int r = 0; r < num_c(in); ++r) {
    uint32_t undefined = 0;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t packed = 0;
      for (int i = 0; i < (in.flag ? 2 : 1); ++i) {
        const int element = in.flag ? 2 * r + i : r;
        const int row = row_of(in, l, element), column = column_of(l, element);
        if (tile.bad[row][column] || tile.bad_row[row] || tile.bad_column[column]) undefined |= 1u << l;
        if (in.flag) {
          packed |= static_cast<uint32_t>(to_half(tile.c[row][column])) << (16 * i);
        } else if (in.mode == kDouble) {
          destination<double>(c, regs[r])[l] = tile.c[row][column];
        } else {
          destination<float>(c, regs[r])[l] = canonical(static_cast<float>(tile.c[row][column]));
        }
      }
      if (in.flag) destination<uint32_t>(c, regs[r])[l] = packed;
    }
    set_undefined(c, regs[r], undefined, kAllLanes);
  }
}

template <int kDepth>
void accumulate(Tile& tile, int rows) {
  for (int row = 0; row < rows; ++row) {
    double sum[kN] = {};
    for (int k = 0; k < kDepth; ++k) {
      const double x = tile.a[row][k];
      for (int n = 0; n < kN; ++n) sum[n] = std::fma(x, tile.b[k][n], sum[n]);  // float64: as its unit does
    }
    for (int n = 0; n < kN; ++n) tile.c[row][n] += sum[n];
  }
}

void multiply(Context& c, const Instr& in, uint32_t mask) {
  if (mask != kAllLanes) fault(c, "collective", "mma needs all 32 lanes");
  alignas(64) Tile tile;
  const Operand* d = in.list.data();
  const Operand* a = d + num_c(in);
  for (const Operand* x = a; x != d + in.list.size(); ++x) tile.any_bad = tile.any_bad || undefined_lanes(c, *x) != 0;
  const Operand* b = a + num_a(in);
  gather_a(c, in, a, tile);
  gather_b(c, in, b, tile);
  gather_c(c, in, b + num_b(in), tile);
  if (in.imm == 16) {
    accumulate<16>(tile, rows_of(in));
  } else if (in.imm == 8) {
    accumulate<8>(tile, rows_of(in));
  } else {
    accumulate<4>(tile, rows_of(in));
  }
  scatter_d(c, in, d, tile);
  ++c.launch->counters.matrix_multiplies;
}

// ldmatrix: count matrices of 8 rows of 16 bytes, row i of matrix m at the address of lane 8 m + i. flag: transposed.
void load_matrix(Context& c, const Instr& in, uint32_t mask) {
  if (mask != kAllLanes) fault(c, "collective", "ldmatrix needs all 32 lanes");
  Access access;
  access.bytes = 4;
  access.count = 4;
  const uint32_t rows = in.count == 4 ? kAllLanes : (1u << (8 * in.count)) - 1;
  read_addresses(c, in.a, in.imm, rows, access);
  each_space(c, in, access, [&](Access& part) {
    if (part.space != Space::kShared || part.mask != rows) fault(c, "bad address", "ldmatrix reads shared memory");
    uint32_t undefined[4] = {};
    track_read(c, part, undefined);
    for (uint32_t m = 0; m < in.count; ++m) {
      uint32_t* d = destination<uint32_t>(c, in.list[m]);
      uint32_t bad = 0;
      uint32_t result[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = in.flag ? l % 4 * 2 + i : l / 4;
          const int column = in.flag ? l / 4 : l % 4 * 2 + i;
          const int from = static_cast<int>(8 * m) + row;
          std::memcpy(&pair[i], part.at[from] + 2 * column, 2);
          if (undefined[column / 2] >> from & 1) bad |= 1u << l;
        }
        result[l] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
      std::memcpy(d, result, sizeof result);
      set_undefined(c, in.list[m], bad, kAllLanes);
    }
  });
}

bool decode_mma(Decoder& d, Instr& in) {
  in.cls = Class::kMatrix;
  in.run = multiply;
  const Type c_type = d.type(0), b_type = d.type(1), a_type = d.type(2), d_type = d.type(3);
  const bool same = a_type.kind == b_type.kind && c_type.kind == d_type.kind && c_type.bytes == d_type.bytes;
  if (!same || !d.has("row") || !d.has("col") || d.has("sp")) d.fail("not implemented");
  in.mode = a_type.kind == 'h' ? kHalf : a_type.kind == 'g' ? kBFloat : a_type.kind == 't' ? kTf32 : kDouble;
  in.flag = c_type.kind == 'h';
  const bool shape_16 = d.has("m16n8k16"), shape_8 = d.has("m16n8k8"), shape_4 = d.has("m16n8k4");
  in.imm = shape_16 ? 16 : shape_8 ? 8 : 4;
  const bool known = in.mode == kDouble ? a_type.kind == 'f' && a_type.bytes == 8 && d.has("m8n8k4")
                     : in.mode == kTf32 ? shape_8 || shape_4
                                        : shape_16 || shape_8;
  if (!known || (in.flag && in.mode != kHalf)) d.fail("not implemented");
  const int wanted[] = {num_c(in), num_a(in), num_b(in), num_c(in)};
  for (size_t i = 0; i < 4; ++i) {
    const std::vector<std::string_view> members = d.members(i);
    if (static_cast<int>(members.size()) != wanted[i]) d.fail("not as many registers as the shape needs");
    for (std::string_view member : members)
      in.list.push_back(i == 0 ? d.destination(member)
                               : d.source(member, in.mode == kDouble ? a_type : Type{'b', 4, false}));
  }
  return true;
}

}  // namespace

bool decode_matrix(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  if (op != "mma" && op != "ldmatrix") return false;
  in.kind = Kind::kCollective;
  in.c = d.constant(kAllLanes, 4);
  if (op == "mma") return decode_mma(d, in);
  in.cls = Class::kLoadMatrix;
  if (!d.has("m8n8") || !d.has("b16")) d.fail("not implemented");
  in.space = d.has("shared") || d.has("shared::cta") ? Space::kShared : Space::kGeneric;
  in.count = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  in.flag = d.has("trans");
  for (std::string_view member : d.members(0)) in.list.push_back(d.destination(member));
  if (in.list.size() != in.count) d.fail("not as many registers as matrices");
  d.address(d.text(1), in);
  in.run = load_matrix;
  return true;
}

}  // namespace ptxvm
