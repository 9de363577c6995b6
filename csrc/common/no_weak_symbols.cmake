# cmake -DNM=nm -DOBJECTS="a.o;b.o" -P no_weak_symbols.cmake
# An object compiled for AVX must not define weak functions (std templates, inline functions that were not inlined): the
# linker keeps one copy for the whole library, and with the AVX one the baseline would crash on a CPU without AVX.
foreach(object ${OBJECTS})
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX " DW\\.ref\\.")      # pointers to the exception personality: data, no code
  if(weak)
    list(JOIN weak "\n  " weak)
    message(SEND_ERROR "${object} defines weak symbols:\n  ${weak}")
  endif()
endforeach()
