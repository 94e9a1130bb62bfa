// What a whole process does: how it ends, what it is linked with, what it does
// without a compiler or a place for its programs.
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>

#include "reprise/reprise.h"
#include "tests/child_process.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Settings = std::vector<std::pair<std::string, std::string>>;

Ended train(const Settings& settings, const std::vector<std::string>& arguments = {"train", "60"}) {
  std::vector<std::string> command{plain_program()};
  command.insert(command.end(), arguments.begin(), arguments.end());
  Settings all{{"REPRISE_COMPILE_AFTER", "1"}};
  all.insert(all.end(), settings.begin(), settings.end());
  return run_child(command, all);
}

/// It ended well, with values like eager's.
void expect_right(const Ended& ended, int status = 0, double tolerance = 1e-4) {
  EXPECT_EQ(ended.signal, 0) << ended.output;
  EXPECT_EQ(ended.status, status) << ended.output;
  EXPECT_EQ(ended.count("device lazy"), 1u) << ended.output;
  const auto at = ended.output.find("difference ");
  ASSERT_NE(at, std::string::npos) << ended.output;
  EXPECT_LT(std::stod(ended.output.substr(at + 11)), tolerance) << ended.output;
}

TEST(Linking, AProgramThatNamesNothingOfRepriseGetsTheDevice) {
  const Ended ended = train({{"REPRISE_COMPILE", "0"}});
  expect_right(ended);
  EXPECT_EQ(ended.count("Warning"), 0u) << ended.output;
}

TEST(Linking, NoPythonIsLinked) {
  const auto self = std::filesystem::read_symlink("/proc/self/exe").string();
  std::string library;
  for (const auto& file : {self, plain_program()}) {
    const Ended ended = run_child({"ldd", file});
    EXPECT_EQ(ended.status, 0);
    EXPECT_GE(ended.count("libreprise.so"), 1u) << ended.output;
    EXPECT_EQ(ended.count("libpython"), 0u) << ended.output;
    EXPECT_EQ(ended.count("libreprise_compiler"), 0u) << ended.output;
    EXPECT_EQ(ended.count("not found"), 0u) << ended.output;
    const auto arrow = ended.output.find("=> ", ended.output.find("libreprise.so"));
    library = ended.output.substr(arrow + 3, ended.output.find(' ', arrow + 3) - arrow - 3);
  }
  EXPECT_EQ(run_child({"ldd", library}).count("libpython"), 0u);
}

/// A process that ends while the compiling thread is in imports or in a compile.
void expect_ends_at_once(int milliseconds, const std::string& cache) {
  SCOPED_TRACE(milliseconds);
  const Ended ended = train({{"REPRISE_CACHE_DIR", cache}},
                            {"train", "20", std::to_string(milliseconds), "7"});
  expect_right(ended, 7);
  EXPECT_LT(ended.seconds, milliseconds / 1000.0 + 4) << ended.output;  // 2 s are its start
}

TEST(ProcessExit, DuringTheImportsIsClean) {
  for (const int milliseconds : {0, 300, 1000, 2500, 5000}) {
    expect_ends_at_once(milliseconds, make_folder("imports"));
  }
}

TEST(ProcessExit, DuringACompileIsClean) {
  for (const int milliseconds : {8'000, 11'000}) {
    expect_ends_at_once(milliseconds, make_folder("compile"));
  }
}

TEST(ProcessExit, WhilePackagesAreLoadedIsClean) {
  const Settings environment = {
      {"REPRISE_COMPILE_AFTER", "1"}, {"REPRISE_CACHE_DIR", make_folder("loading")}};
  expect_right(run_child({plain_program(), "train", "60", "15000"}, environment));
  for (const char* steps : {"3", "4", "5", "6", "7", "8", "10", "12"}) {
    const Ended ended = run_child({plain_program(), "train", steps}, environment);
    EXPECT_EQ(ended.signal, 0) << ended.output;
    EXPECT_EQ(ended.status, 0) << ended.output;
  }
}

TEST(ProcessExit, OfAChildThatWasForkedBeforeFirstUse) {
  const Ended ended = run_child({plain_program(), "fork", "20"}, {{"REPRISE_COMPILE", "0"}});
  EXPECT_EQ(ended.signal, 0) << ended.output;
  EXPECT_EQ(ended.status, 0) << ended.output;
  EXPECT_EQ(ended.count("device lazy"), 2u) << ended.output;
  EXPECT_EQ(ended.count("difference 0\n"), 2u) << ended.output;
}

TEST(ProcessExit, WithTensorsThatOutliveMain) {
  for (const char* compile : {"0", "1"}) {
    const Ended ended = run_child({plain_program(), "global", "40"},
                                  {{"REPRISE_COMPILE", compile},
                                   {"REPRISE_COMPILE_AFTER", "1"},
                                   {"REPRISE_CACHE_DIR", make_folder("global")}});
    expect_right(ended);
    EXPECT_EQ(ended.count("last 6\n"), 1u) << ended.output;
  }
}

TEST(ProcessExit, BySignalDuringACompile) {
  // As from a terminal: to the whole group. The program has no handler, so it ends by it.
  const Ended ended = run_child({"timeout", "--signal=INT", "9", "env", "--default-signal=INT",
                                 plain_program(), "train", "20", "60000"},
                                {{"REPRISE_COMPILE_AFTER", "1"},
                                 {"REPRISE_CACHE_DIR", make_folder("interrupted")}});
  EXPECT_LT(ended.seconds, 13.0) << ended.output;
  EXPECT_EQ(ended.status, 124) << ended.output;  // timeout's own
}

TEST(WithoutACompiler, APythonThatIsNotThereIsOneWarning) {
  const Ended ended = train({{"REPRISE_PYTHON", "/nowhere/python"},
                             {"REPRISE_CACHE_DIR", make_folder("no-python")}},
                            {"scale", "60", "0.5"});
  expect_right(ended);
  EXPECT_EQ(ended.count("[W"), 1u) << ended.output;
  EXPECT_GE(ended.count("/nowhere/python"), 1u) << ended.output;
  EXPECT_GE(ended.count("REPRISE_PYTHON"), 1u) << ended.output;
}

TEST(WithoutACompiler, APythonWithoutTorchIsOneWarning) {
  const Ended ended =
      train({{"REPRISE_PYTHON", "/usr/bin/python3"}, {"REPRISE_CACHE_DIR", make_folder("bare")}},
            {"scale", "60", "0.5"});
  expect_right(ended);
  EXPECT_EQ(ended.count("[W"), 1u) << ended.output;
  EXPECT_GE(ended.count("torch"), 1u) << ended.output;
}

TEST(WithoutACompiler, NoCxxCompilerLeavesTheProgramInterpreted) {
  const std::string empty = make_folder("empty-path");
  const Ended ended = train({{"PATH", empty},
                             {"CXX", ""},
                             {"REPRISE_CACHE_DIR", make_folder("no-cxx")}},
                            {"scale", "60", "0.5"});
  expect_right(ended);
  EXPECT_GE(ended.count("[W"), 1u) << ended.output;
  EXPECT_LE(ended.count("[W"), 3u) << ended.output;  // one a program
}

/// Settings with C++ compilers that say what they are, and do what `script` says where
/// they are to compile.
Settings compilers_that(const std::string& name, const std::string& script) {
  const std::string folder = make_folder(name);
  for (const char* compiler : {"g++", "c++", "gcc", "clang++"}) {
    const std::string file = folder + "/" + compiler;
    std::ofstream(file) << "#!/bin/sh\ncase \"$*\" in *.cpp*|*.o*) " << script
                        << ";; *) exec /usr/bin/" << compiler << " \"$@\";; esac\n";
    ::chmod(file.c_str(), 0700);
  }
  return {{"PATH", folder + ":/usr/bin:/bin"},
          {"CXX", folder + "/g++"},
          {"WAIT_FOR_COMPILES", "1"},
          {"REPRISE_CACHE_DIR", make_folder(name + "-cache")}};
}

TEST(WithoutACompiler, AKilledCompilerLeavesTheProgramInterpreted) {
  const Ended ended = train(compilers_that("killed", "kill -9 $$"));
  expect_right(ended);
  EXPECT_GE(ended.count("could not be compiled and stays interpreted"), 1u) << ended.output;
}

TEST(WithoutACompiler, ACompileThatTakesForEverIsGivenUp) {
  Settings settings = compilers_that("endless", "sleep 1000");
  settings.emplace_back("REPRISE_COMPILE_SECONDS", "3");
  const Ended ended = train(settings);
  expect_right(ended);
  EXPECT_GE(ended.count("it took longer than 3 s"), 1u) << ended.output;
  EXPECT_LT(ended.seconds, 60.0);
}

/// The folder of a library that was built without the compiler.
std::string without_compiler() {
  const std::string library = std::getenv("REPRISE_TEST_LIBRARY");
  return std::filesystem::path(library).parent_path() / "without_compiler";
}

/// A number that a report of REPRISE_REPORT holds; -1 where it has none.
int64_t reported(const std::string& file, const std::string& name) {
  std::ifstream in(file);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const auto at = text.find("\"" + name + "\": ");
  return at == std::string::npos ? -1 : std::stoll(text.substr(at + name.size() + 4));
}

TEST(WithoutACompiler, ALibraryBuiltSoRunsFromAFilledStore) {
  const std::string filled = make_folder("filled"), empty = make_folder("not-filled");
  const std::string report = make_folder("reports") + "/report.json";
  expect_right(train({{"REPRISE_CACHE_DIR", filled}, {"WAIT_FOR_COMPILES", "1"}}));
  for (const auto& store : {filled, empty}) {
    SCOPED_TRACE(store);
    const Ended ended = train({{"LD_LIBRARY_PATH", without_compiler()},
                               {"REPRISE_PYTHON", "/nowhere/python"},
                               {"REPRISE_REPORT", report},
                               {"REPRISE_LOG", "1"},
                               {"REPRISE_CACHE_DIR", store},
                               {"WAIT_FOR_COMPILES", "1"}});
    expect_right(ended);
    EXPECT_EQ(reported(report, "programs_compiled"), 0);
    if (store == filled) {
      EXPECT_GT(reported(report, "programs_loaded"), 0);
      EXPECT_GT(reported(report, "segments_replayed"), 0);
    } else {
      EXPECT_EQ(reported(report, "programs_loaded"), 0);
      EXPECT_GE(ended.count("was built without a compiler"), 1u) << ended.output;
    }
  }
}

TEST(WithoutACompiler, ALibraryBuiltSoNamesNoPython) {
  const std::string library = without_compiler() + "/libreprise.so.0";
  const Ended linked = run_child({"ldd", library});
  EXPECT_EQ(linked.status, 0) << linked.output;
  EXPECT_EQ(linked.count("libpython"), 0u) << linked.output;
  std::ifstream in(library, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  ASSERT_GT(bytes.size(), 1'000'000u);
  EXPECT_EQ(bytes.find("libreprise_compiler"), std::string::npos);
}

TEST(WithoutACompiler, CompilingSwitchedOffSaysNothing) {
  const Ended ended = train({{"REPRISE_COMPILE", "0"}, {"REPRISE_PYTHON", "/nowhere/python"}});
  expect_right(ended);
  EXPECT_EQ(ended.count("[W"), 0u) << ended.output;
}

void expect_one_warning_about_the_folder(const std::string& folder, const std::string& why) {
  SCOPED_TRACE(why);
  const Ended ended = train({{"REPRISE_CACHE_DIR", folder}}, {"train", "60", "1500"});
  expect_right(ended);
  EXPECT_EQ(ended.count("the cache folder"), 1u) << ended.output;
  EXPECT_GE(ended.count(why), 1u) << ended.output;
  EXPECT_GE(ended.count("REPRISE_CACHE_DIR"), 1u) << ended.output;
}

TEST(CacheFolder, OthersMayNotWriteToIt) {
  const std::string folder = make_folder("open");
  ::chmod(folder.c_str(), 0777);
  expect_one_warning_about_the_folder(folder, "others may write to it");
}

TEST(CacheFolder, AFileInItsPlaceIsOneWarning) {
  const std::string folder = make_folder("parent");
  std::fclose(std::fopen((folder + "/file").c_str(), "w"));
  expect_one_warning_about_the_folder(folder + "/file", "it is no folder");
  expect_one_warning_about_the_folder(folder + "/file/below", "it cannot be made");
}

TEST(CacheFolder, AnotherUsersIsRefused) {
  if (::geteuid() == 0) {
    const std::string folder = make_folder("foreign");
    ASSERT_EQ(::chown(folder.c_str(), 1, 1), 0);
    expect_one_warning_about_the_folder(folder, "another user owns it");
  } else {
    expect_one_warning_about_the_folder("/usr", "another user owns it");
  }
}

TEST(CacheFolder, IsMadeForItsUserAlone) {
  const std::string folder = make_folder("above") + "/made/here";
  const Ended ended = train({{"REPRISE_CACHE_DIR", folder}}, {"train", "20", "500"});
  expect_right(ended);
  struct stat info {};
  ASSERT_EQ(::stat(folder.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
}

TEST(CacheFolder, AFullDiskIsAWarningAndNothingMore) {
  const std::string folder = make_folder("full");
  const std::string script = "mount -t tmpfs -o size=48k,mode=700 none " + folder +
                             " && exec " + plain_program() + " train 60";
  if (run_child({"unshare", "-m", "mount", "-t", "tmpfs", "none", folder}).status != 0) {
    GTEST_SKIP() << "no file system can be mounted here";
  }
  const Ended ended = run_child({"unshare", "-m", "sh", "-c", script},
                                {{"REPRISE_COMPILE_AFTER", "1"},
                                 {"WAIT_FOR_COMPILES", "1"},
                                 {"REPRISE_CACHE_DIR", folder}});
  expect_right(ended);
  EXPECT_GE(ended.count("No space left on device"), 1u) << ended.output;
}

std::vector<std::filesystem::path> packages_in(const std::string& folder) {
  std::vector<std::filesystem::path> packages;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".pt2") packages.push_back(entry.path());
  }
  return packages;
}

TEST(CacheFolder, TheCommandLineToolListsVerifiesAndPrunes) {
  const std::string folder = make_folder("tool");
  expect_right(train({{"REPRISE_CACHE_DIR", folder}}, {"scale", "60", "0.5"}));
  const auto packages = packages_in(folder);
  ASSERT_EQ(packages.size(), 1u);
  const std::string name = packages[0].stem().string();
  const auto tool = [&](std::vector<std::string> arguments) {
    const auto program = std::filesystem::path(plain_program()).parent_path() / "reprise-cache";
    arguments.insert(arguments.begin(), {program.string(), "--folder", folder});
    return run_child(arguments);
  };
  Ended ended = tool({"list"});
  EXPECT_EQ(ended.status, 0);
  EXPECT_EQ(ended.count("  cpu "), 1u) << ended.output;
  EXPECT_EQ(ended.count(name), 1u) << ended.output;
  EXPECT_EQ(ended.count("1 programs, "), 1u) << ended.output;
  ended = tool({"show", name.substr(0, 6)});
  EXPECT_EQ(ended.status, 0);
  EXPECT_EQ(ended.count("AOTI_DEVICE_KEY: cpu"), 1u) << ended.output;
  EXPECT_EQ(tool({"verify"}).count("1 programs load, 0 do not"), 1u);

  const std::string damaged = folder + "/damaged.pt2";
  std::filesystem::copy_file(packages[0], damaged);
  std::filesystem::resize_file(damaged, std::filesystem::file_size(damaged) / 2);
  EXPECT_EQ(tool({"list"}).count("damaged"), 2u);  // what it is, and its name
  ended = tool({"verify"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.count(damaged + ": "), 1u) << ended.output;
  EXPECT_EQ(tool({"verify", "--drop"}).status, 0);
  EXPECT_EQ(packages_in(folder), packages);

  EXPECT_EQ(tool({"prune", "0"}).count("1 programs are removed"), 1u);
  EXPECT_TRUE(packages_in(folder).empty());
  EXPECT_EQ(tool({"prune", "much"}).status, 2);
  EXPECT_EQ(tool({"show", "none"}).count("no program's name begins with 'none'"), 1u);
  EXPECT_EQ(tool({}).count("usage: reprise-cache"), 1u);
}

/// REPRISE_KILLS says how often; each takes some seconds.
TEST(CacheFolder, AKilledCompilerLeavesAUsableStore) {
  const char* wanted = std::getenv("REPRISE_KILLS");
  const int kills = wanted != nullptr ? std::atoi(wanted) : 6;
  const std::string folder = make_folder("killed");
  const Settings settings{{"REPRISE_CACHE_DIR", folder}, {"REPRISE_COMPILE_AFTER", "1"}, {"WAIT_FOR_COMPILES", "1"}};
  const auto program = std::filesystem::path(plain_program());
  const auto verify = [&] {
    return run_child({(program.parent_path() / "reprise-cache").string(), "--folder", folder, "verify"});
  };
  std::mt19937 generator(static_cast<unsigned>(kills));
  std::uniform_real_distribution<double> seconds(2.5, 7.5);
  int killed = 0;
  for (int k = 0; k < kills; ++k) {
    const Ended ended = run_child({"timeout", "-s", "KILL", std::to_string(seconds(generator)), program.string(),
                                   "scale", "60", std::to_string(0.5 + k * 0.001)}, settings);
    killed += ended.status == 137 || ended.signal == SIGKILL;
    if (ended.status == 0) expect_right(ended, 0, 1e-3);  // of some 2000: a few units
    const Ended checked = verify();
    EXPECT_EQ(checked.status, 0) << "after kill " << k << ": " << checked.output;
  }
  EXPECT_GT(killed, 0);
  std::cout << killed << " of " << kills << " processes were killed\n";
  // And it is used: compiled once, then loaded.
  for (const char* warnings : {"first", "second"}) {
    SCOPED_TRACE(warnings);
    const Ended ended = run_child({program.string(), "scale", "60", "0.25"}, settings);
    expect_right(ended);
    EXPECT_EQ(ended.count("Warning"), 0u) << ended.output;
  }
  EXPECT_EQ(verify().status, 0);
}

TEST(CacheFolder, WhatWasNotUsedForLongestMakesRoom) {
  const std::string folder = make_folder("bounded");
  const auto run = [&](const char* factor, const char* bytes) {
    expect_right(train({{"REPRISE_CACHE_DIR", folder}, {"REPRISE_CACHE_BYTES", bytes}},
                       {"scale", "60", factor}));
  };
  run("0.5", "0");
  const auto first = packages_in(folder);
  ASSERT_EQ(first.size(), 1u);
  const auto bytes = std::filesystem::file_size(first[0]);
  std::filesystem::create_directory(folder + "/.partial-abandoned");
  std::filesystem::last_write_time(folder + "/.partial-abandoned",
                                   std::filesystem::file_time_type::clock::now() - std::chrono::hours(48));
  std::filesystem::create_directory(folder + "/.partial-of-now");

  run("0.25", std::to_string(5 * bytes / 2).c_str());
  EXPECT_EQ(packages_in(folder).size(), 2u);
  EXPECT_FALSE(std::filesystem::exists(folder + "/.partial-abandoned"));
  EXPECT_TRUE(std::filesystem::exists(folder + "/.partial-of-now"));
  run("0.5", "1");  // loaded, not compiled: used, and nothing new
  EXPECT_EQ(packages_in(folder).size(), 2u);
  run("0.75", std::to_string(5 * bytes / 2).c_str());
  EXPECT_EQ(packages_in(folder).size(), 2u);
  EXPECT_TRUE(std::filesystem::exists(first[0]));
  run("1.25", "1");  // the newest stays, however large
  EXPECT_EQ(packages_in(folder).size(), 1u);
  EXPECT_FALSE(std::filesystem::exists(first[0]));
}

TEST(CacheFolder, WhatWasUsedLaterInOneSecondStays) {
  const std::string folder = make_folder("moments");
  const auto second = std::filesystem::file_time_type(std::chrono::seconds(1'000));
  constexpr int kPrograms = 16, kKept = 8;
  for (int k = 0; k < kPrograms; ++k) {
    const std::string package = c10::str(folder, "/", k, ".pt2");
    std::ofstream(package) << "!";
    // In the order 7, 14, 5, ..., which is neither that of the names nor of their making.
    const int rank = (7 * (k + 1)) % kPrograms;
    std::filesystem::last_write_time(package, second + std::chrono::milliseconds(10 * rank));
  }
  const auto tool = std::filesystem::path(plain_program()).parent_path() / "reprise-cache";
  const Ended ended =
      run_child({tool.string(), "--folder", folder, "prune", std::to_string(kKept)});
  EXPECT_EQ(ended.count("8 programs are removed"), 1u) << ended.output;
  for (int k = 0; k < kPrograms; ++k) {
    EXPECT_EQ(std::filesystem::exists(c10::str(folder, "/", k, ".pt2")),
              (7 * (k + 1)) % kPrograms >= kPrograms - kKept)
        << k;
  }
}

TEST(CacheFolder, ADamagedProgramIsCompiledAgain) {
  const std::string folder = make_folder("damaged");
  const Settings settings{
      {"REPRISE_CACHE_DIR", folder}, {"REPRISE_LOG", "1"}, {"WAIT_FOR_COMPILES", "1"}};
  const Ended first = train(settings);
  expect_right(first);
  const auto packages = packages_in(folder);
  for (const auto& package : packages) std::filesystem::resize_file(package, 100);
  ASSERT_GE(packages.size(), 1u) << first.output;
  const Ended second = train(settings);
  expect_right(second);
  EXPECT_GE(second.count("damaged"), 1u) << second.output;
  EXPECT_GE(second.count("compiled "), 1u) << second.output;
  // And it is good for the next process, which needs no Python then.
  const Ended third = train({{"REPRISE_CACHE_DIR", folder},
                             {"REPRISE_PYTHON", "/nowhere/python"},
                             {"WAIT_FOR_COMPILES", "1"}});
  expect_right(third);
  EXPECT_EQ(third.count("[W"), 0u) << third.output;
}

/// The only package in a folder.
std::filesystem::path package_in(const std::string& folder) {
  const auto packages = packages_in(folder);
  return packages.empty() ? std::filesystem::path() : packages.back();
}

TEST(WrongPrograms, AreRefusedAtTheirFirstRun) {
  const std::string half = make_folder("half"), quarter = make_folder("quarter");
  expect_right(train({{"REPRISE_CACHE_DIR", half}}, {"scale", "30", "0.5"}));
  expect_right(train({{"REPRISE_CACHE_DIR", quarter}}, {"scale", "30", "0.25"}));
  ASSERT_FALSE(package_in(half).empty());
  ASSERT_FALSE(package_in(quarter).empty());
  // As if the compiler had taken one factor for the other.
  std::filesystem::copy_file(package_in(half), package_in(quarter),
                             std::filesystem::copy_options::overwrite_existing);
  const Ended ended = train({{"REPRISE_CACHE_DIR", quarter}}, {"scale", "30", "0.25"});
  expect_right(ended);
  EXPECT_EQ(ended.count("is not used: its first run differed"), 1u) << ended.output;
  // Without the check its values would be the user's.
  const Ended unchecked = train({{"REPRISE_CACHE_DIR", quarter}, {"REPRISE_CHECK", "0"}, {"REPRISE_DEMOTE", "0"}},
                                {"scale", "30", "0.25"});
  const auto at = unchecked.output.find("difference ");
  ASSERT_NE(at, std::string::npos) << unchecked.output;
  EXPECT_GT(std::stod(unchecked.output.substr(at + 11)), 0.1) << unchecked.output;
}

}  // namespace
}  // namespace reprise::test
