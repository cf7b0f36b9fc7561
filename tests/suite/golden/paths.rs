//! All of these tests on every path through the arithmetic that the machine has.

use std::process::Command;

use helion::engine::kernel_paths;

/// The path that the other tests take is the last one.
#[test]
fn every_path_passes_the_golden_tests() {
    let paths = kernel_paths();
    let (_, others) = paths.split_last().unwrap();
    for path in others {
        let tests = Command::new(std::env::current_exe().unwrap())
            .args(["golden::", "--skip", "golden::paths"])
            .env("HELION_KERNELS", path)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&tests.stdout);
        assert!(tests.status.success(), "on {path}: {told}");
        assert!(!told.contains("running 0 tests"), "{told}");
    }
}
