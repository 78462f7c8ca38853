use proptest::prelude::*;

use super::Duration;

#[test]
fn durations_of_gep_2257() {
    for (given, millis) in [
        ("0h", 0),
        ("0s", 0),
        ("0h0m0s", 0),
        ("1h", 3_600_000),
        ("30m", 1_800_000),
        ("10s", 10_000),
        ("500ms", 500),
        ("2h45m", 9_900_000),
        ("1h30m10s5ms", 5_410_005),
        ("1s1s", 2_000),
        ("10s30m1h", 5_410_000),
        ("99999h", 359_996_400_000),
    ] {
        assert_eq!(
            given.parse::<Duration>().unwrap().as_millis(),
            millis,
            "{given}"
        );
    }
}

#[test]
fn what_is_not_a_duration_is_refused() {
    for bad in [
        "",
        "1",
        "1d",
        "1us",
        "1.5s",
        "-1s",
        "+1s",
        "s",
        "1 s",
        "100000s",
        "1h1m1s1ms1ms",
        "1S",
        "1sec",
        "١s",
    ] {
        assert!(bad.parse::<Duration>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn a_printed_duration_reads_back(millis in 0u64..=359_999_999_999) {
        prop_assume!(millis < 99_999 * 3_600_000);
        let duration = Duration::from_millis(millis);
        prop_assert_eq!(duration.to_string().parse::<Duration>().unwrap(), duration);
    }

    #[test]
    fn no_string_panics(given in "\\PC*") {
        let _ = given.parse::<Duration>();
    }
}
