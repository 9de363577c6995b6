// Keeps a library that a new toolchain built loadable on an older Linux (manylinux_2_28: glibc 2.28, the libstdc++ of
// gcc 8).  The headers of torch's stable ABI use string streams and shared pointers, for which libstdc++ since gcc 9 and
// glibc since 2.32 have new symbols.  Defined here, and hidden by exports.map, they are not asked of the system.
#include <new>
#include <sstream>

template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// What std::vector throws for an absurd size; in libstdc++ since gcc 11.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// "Does this process have one thread only?": no, so reference counts are always atomic.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
