// image.h: what a module's image is, before the driver reads it. The driver takes no length: what claims to be longer than it is would
// be read past its end.
#pragma once
#include <elf.h>

#include <cstdint>
#include <cstring>
#include <string_view>

#include "checks.h"

namespace fkv {

struct FatbinHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // after the header
};
constexpr uint32_t kFatbinMagic = 0xba55ed50;

inline int32_t check_cubin(const char* image, uint64_t bytes) {
  Elf64_Ehdr header;
  FKV_REQUIRE(bytes >= sizeof header, FKV_BAD_ARGUMENT, "image: a cubin cut off after %llu bytes",
              static_cast<unsigned long long>(bytes));
  std::memcpy(&header, image, sizeof header);
  constexpr Elf64_Half kCudaMachine = 190;
  FKV_REQUIRE(header.e_ident[EI_CLASS] == ELFCLASS64 && header.e_machine == kCudaMachine, FKV_BAD_ARGUMENT,
              "image: an ELF file that is no cubin; nvcc -cubin makes one");
  const auto within = [&](uint64_t offset, uint64_t count, uint64_t each) {
    return offset <= bytes && count * each <= bytes - offset;
  };
  const bool tables = within(header.e_shoff, header.e_shnum, header.e_shentsize) &&
                      within(header.e_phoff, header.e_phnum, header.e_phentsize) && header.e_shentsize >= sizeof(Elf64_Shdr);
  FKV_REQUIRE(tables, FKV_BAD_ARGUMENT, "image: a cubin cut off after %llu bytes", static_cast<unsigned long long>(bytes));
  for (int i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr section;
    std::memcpy(&section, image + header.e_shoff + uint64_t{header.e_shentsize} * i, sizeof section);
    FKV_REQUIRE(section.sh_type == SHT_NOBITS || within(section.sh_offset, 1, section.sh_size), FKV_BAD_ARGUMENT,
                "image: a cubin cut off after %llu bytes", static_cast<unsigned long long>(bytes));
  }
  return FKV_OK;
}

// FKV_BAD_ARGUMENT unless `bytes` at `image` are a whole cubin or fatbin, or text that may be PTX.
inline int32_t check_image(const char* image, uint64_t bytes) {
  const std::string_view text(image, bytes);
  if (text.substr(0, SELFMAG) == std::string_view(ELFMAG, SELFMAG)) return check_cubin(image, bytes);
  FatbinHeader header;
  if (bytes >= sizeof header) {
    std::memcpy(&header, image, sizeof header);
    if (header.magic == kFatbinMagic) {
      const bool whole = header.header_bytes >= sizeof header && header.header_bytes <= bytes &&
                         header.bytes <= bytes - header.header_bytes;
      FKV_REQUIRE(whole, FKV_BAD_ARGUMENT, "image: a fatbin cut off after %llu bytes", static_cast<unsigned long long>(bytes));
      return FKV_OK;
    }
  }
  FKV_REQUIRE(text.find(".version") != std::string_view::npos && text.find(".target") != std::string_view::npos, FKV_BAD_ARGUMENT,
              "image: neither a cubin, a fatbin nor PTX; nvcc -cubin, -fatbin or -ptx makes one");
  return FKV_OK;
}

}  // namespace fkv
