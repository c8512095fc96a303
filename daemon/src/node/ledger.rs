//! Who holds which GiB of which device. Pure: no clock, no disk, no kubelet.
//!
//! A *unit* is one GiB of one device, the thing that the kubelet hands out. A *grant* is the set of units that one
//! allocation gave. An *engine* uses the memory of its grant from its start until the memory is really back, which may
//! be later than the end of the grant.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One GiB of one device, written as `cpu0-007`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Unit {
    pub device: String,
    pub index: u32,
}

/// A text that is no unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("wanted a unit such as cpu0-007, got {0:?}")]
pub struct NotAUnit(String);

impl FromStr for Unit {
    type Err = NotAUnit;

    fn from_str(text: &str) -> Result<Self, NotAUnit> {
        let error = || NotAUnit(text.chars().take(64).collect());
        let (device, index) = text.rsplit_once('-').ok_or_else(error)?;
        let index = index.parse().map_err(|_| error())?;
        Ok(Self { device: device.to_owned(), index })
    }
}

impl TryFrom<String> for Unit {
    type Error = NotAUnit;

    fn try_from(text: String) -> Result<Self, NotAUnit> {
        text.parse()
    }
}

impl From<Unit> for String {
    fn from(unit: Unit) -> Self {
        unit.to_string()
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:03}", self.device, self.index)
    }
}

/// The name of a grant; also that of its socket's folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GrantId(pub String);

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a device can be granted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Healthy,
    /// Its units stay, so that whoever holds them can see it.
    Unhealthy {
        reason: String,
    },
}

/// Something with memory to grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Such as `cpu0`; without a dash at the end.
    pub name: String,
    pub gib: u32,
    pub health: Health,
}

/// Memory of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub device: String,
    pub capacity_gib: u32,
    /// Of grants that have not ended.
    pub granted_gib: u32,
    /// Of engines, also of those whose grant has ended.
    pub used_gib: u32,
    /// Neither granted nor used.
    pub free_gib: u32,
}

/// Where an engine may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub device: String,
    pub gib: u32,
}

/// Why an engine may not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotStart {
    #[error("the grant has ended: its memory was granted again")]
    Ended,
    #[error("the grant is spread over devices: {}", spread(per_device))]
    Fragmented { per_device: Vec<(String, u32)> },
    #[error("device {device} is unhealthy: {reason}")]
    Unhealthy { device: String, reason: String },
    #[error("an engine of this grant still runs")]
    Running,
    #[error(
        "{wanted_gib} GiB of {device} are granted, {free_gib} GiB are free until an earlier engine has given its memory back"
    )]
    NotYetFree { device: String, wanted_gib: u32, free_gib: u32 },
}

fn spread(per_device: &[(String, u32)]) -> String {
    let parts: Vec<_> =
        per_device.iter().map(|(device, gib)| format!("{gib} GiB of {device}")).collect();
    parts.join(", ")
}

/// Devices, grants and engines. Invariants: grants share no unit; on no device do engines use more than its capacity.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    devices: BTreeMap<String, Device>,
    grants: BTreeMap<GrantId, BTreeSet<Unit>>,
    engines: BTreeMap<GrantId, Place>,
}

impl Ledger {
    /// Nothing granted.
    pub fn new(devices: Vec<Device>) -> Self {
        let devices = devices.into_iter().map(|device| (device.name.clone(), device)).collect();
        Self { devices, ..Self::default() }
    }

    /// Every unit with its device's health, in order.
    pub fn units(&self) -> impl Iterator<Item = (Unit, &Health)> {
        self.devices.values().flat_map(|device| {
            (0..device.gib)
                .map(|index| (Unit { device: device.name.clone(), index }, &device.health))
        })
    }

    /// Gives `units` to a new grant. Grants that held one of them end, since the kubelet has taken it from them; they are
    /// the answer.
    pub fn grant(&mut self, id: GrantId, units: BTreeSet<Unit>) -> Vec<GrantId> {
        let ended: Vec<_> = self
            .grants
            .iter()
            .filter(|(_, held)| !held.is_disjoint(&units))
            .map(|(id, _)| id.clone())
            .collect();
        for id in &ended {
            self.grants.remove(id);
        }
        self.grants.insert(id, units);
        ended
    }

    /// Ends a grant. Its engine, if it has one, goes on counting until [`Ledger::engine_ended`].
    pub fn release(&mut self, id: &GrantId) {
        self.grants.remove(id);
    }

    /// Grants that have not ended.
    pub fn grants(&self) -> impl Iterator<Item = (&GrantId, &BTreeSet<Unit>)> {
        self.grants.iter()
    }

    /// What a grant has of each device.
    pub fn per_device(&self, id: &GrantId) -> Vec<(String, u32)> {
        let mut per_device = BTreeMap::<&str, u32>::new();
        for unit in self.grants.get(id).into_iter().flatten() {
            *per_device.entry(&unit.device).or_default() += 1;
        }
        per_device.into_iter().map(|(device, gib)| (device.to_owned(), gib)).collect()
    }

    /// Takes the memory of a grant for its engine.
    ///
    /// # Errors
    /// When it may not start, or not yet.
    pub fn start_engine(&mut self, id: &GrantId) -> Result<Place, CannotStart> {
        if self.engines.contains_key(id) {
            return Err(CannotStart::Running);
        }
        let mut per_device = self.per_device(id);
        if per_device.len() > 1 {
            return Err(CannotStart::Fragmented { per_device });
        }
        let Some((device, gib)) = per_device.pop() else { return Err(CannotStart::Ended) };
        let capacity = match self.devices.get(&device) {
            Some(Device { health: Health::Unhealthy { reason }, .. }) => {
                return Err(CannotStart::Unhealthy { device, reason: reason.clone() });
            }
            Some(found) => found.gib,
            None => 0,
        };
        let free_gib = capacity.saturating_sub(self.used(&device));
        if free_gib < gib {
            return Err(CannotStart::NotYetFree { device, wanted_gib: gib, free_gib });
        }
        let place = Place { device, gib };
        self.engines.insert(id.clone(), place.clone());
        Ok(place)
    }

    /// The engine has ended and its memory is back.
    pub fn engine_ended(&mut self, id: &GrantId) {
        self.engines.remove(id);
    }

    /// Sets the health that `health` has for a device; says whether anything changed.
    pub fn follow(&mut self, health: impl Fn(&str) -> Option<Health>) -> bool {
        let mut changed = false;
        for device in self.devices.values_mut() {
            if let Some(health) = health(&device.name)
                && health != device.health
            {
                device.health = health;
                changed = true;
            }
        }
        changed
    }

    /// Memory of every device.
    pub fn usage(&self) -> Vec<Usage> {
        let usage = |device: &Device| {
            let granted_gib = count(
                self.grants.values().flatten().filter(|unit| unit.device == device.name).count(),
            );
            let of_ended = |(id, place): (&GrantId, &Place)| {
                (place.device == device.name && !self.grants.contains_key(id)).then_some(place.gib)
            };
            let ending: u32 = self.engines.iter().filter_map(of_ended).sum();
            Usage {
                device: device.name.clone(),
                capacity_gib: device.gib,
                granted_gib,
                used_gib: self.used(&device.name),
                free_gib: device.gib.saturating_sub(granted_gib.saturating_add(ending)),
            }
        };
        self.devices.values().map(usage).collect()
    }

    /// Chooses `size` units of `available`, `must` among them: on one device where that is possible, and there on the one
    /// that it fills best, so that large holes stay large. Fewer than `size` when there are not as many.
    pub fn preferred(
        &self,
        available: &BTreeSet<Unit>,
        must: &BTreeSet<Unit>,
        size: usize,
    ) -> Vec<Unit> {
        let mut by_device = BTreeMap::<&str, Vec<&Unit>>::new();
        for unit in available {
            by_device.entry(&unit.device).or_default().push(unit);
        }
        let started: BTreeSet<&str> = must.iter().map(|unit| unit.device.as_str()).collect();
        let mut devices: Vec<_> = by_device.into_values().collect();
        // First where it has begun, then where it fits, then the tightest; what does not fit takes the roomiest first.
        devices.sort_by_key(|units| {
            let begun = units.first().is_some_and(|unit| started.contains(unit.device.as_str()));
            let fits = units.len() >= size;
            let tightness = if fits { units.len() } else { usize::MAX - units.len() };
            (!begun, !fits, tightness)
        });
        let rest = devices.into_iter().flatten().filter(|unit| !must.contains(unit));
        must.iter().chain(rest).take(size.max(must.len())).cloned().collect()
    }

    fn used(&self, device: &str) -> u32 {
        self.engines.values().filter(|place| place.device == device).map(|place| place.gib).sum()
    }
}

/// Counts of units fit: a device has `u32` GiB.
fn count(units: usize) -> u32 {
    u32::try_from(units).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(name: &str, gib: u32) -> Device {
        Device { name: name.into(), gib, health: Health::Healthy }
    }

    fn units(device: &str, indices: std::ops::Range<u32>) -> BTreeSet<Unit> {
        indices.map(|index| Unit { device: device.into(), index }).collect()
    }

    fn id(name: &str) -> GrantId {
        GrantId(name.into())
    }

    #[test]
    fn units_are_read_as_they_are_written() {
        let unit = Unit { device: "GPU-1b2c-3d".into(), index: 7 };
        assert_eq!(unit.to_string(), "GPU-1b2c-3d-007");
        assert_eq!(unit.to_string().parse(), Ok(unit));
        for text in ["", "cpu0", "cpu0-", "cpu0-x", "cpu0-99999999999"] {
            assert!(text.parse::<Unit>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_engine_waits_for_the_memory_of_an_earlier_one() {
        let mut ledger = Ledger::new(vec![device("cpu0", 4)]);
        ledger.grant(id("a"), units("cpu0", 0..3));
        assert_eq!(ledger.start_engine(&id("a")).unwrap().gib, 3);
        assert_eq!(ledger.start_engine(&id("a")), Err(CannotStart::Running));
        assert_eq!(ledger.grant(id("b"), units("cpu0", 1..4)), [id("a")]);
        let waits = CannotStart::NotYetFree { device: "cpu0".into(), wanted_gib: 3, free_gib: 1 };
        assert_eq!(ledger.start_engine(&id("b")), Err(waits));
        ledger.engine_ended(&id("a"));
        assert!(ledger.start_engine(&id("b")).is_ok());
        assert_eq!(ledger.start_engine(&id("a")), Err(CannotStart::Ended));
    }

    #[test]
    fn a_grant_over_two_devices_says_what_each_gave() {
        let mut ledger = Ledger::new(vec![device("g0", 4), device("g1", 4)]);
        let both = &units("g0", 2..4) | &units("g1", 0..1);
        ledger.grant(id("a"), both);
        let error = ledger.start_engine(&id("a")).unwrap_err();
        assert_eq!(error.to_string(), "the grant is spread over devices: 2 GiB of g0, 1 GiB of g1");
    }

    #[test]
    fn preferred_units_fill_the_tightest_device_that_is_large_enough() {
        let ledger = Ledger::new(vec![device("g0", 8), device("g1", 8)]);
        let available = &units("g0", 0..8) | &units("g1", 4..8);
        let none = BTreeSet::new();
        let chosen = |must: &BTreeSet<Unit>, size| -> BTreeSet<Unit> {
            ledger.preferred(&available, must, size).into_iter().collect()
        };
        assert_eq!(chosen(&none, 3), units("g1", 4..7));
        assert_eq!(chosen(&none, 6), units("g0", 0..6));
        assert_eq!(chosen(&units("g0", 2..3), 2), &units("g0", 0..1) | &units("g0", 2..3));
        assert_eq!(chosen(&none, 12).len(), 12);
        assert_eq!(chosen(&none, 13).len(), 12, "there are no more");
    }

    #[derive(Debug, Clone)]
    enum Action {
        Grant { name: u8, units: Vec<(bool, u32)> },
        Release(u8),
        Start(u8),
        Ended(u8),
        Sick(bool),
        Well(bool),
    }

    fn action() -> impl Strategy<Value = Action> {
        let units = prop::collection::vec((any::<bool>(), 0..8_u32), 1..10);
        prop_oneof![
            (0..6_u8, units).prop_map(|(name, units)| Action::Grant { name, units }),
            (0..6_u8).prop_map(Action::Release),
            (0..6_u8).prop_map(Action::Start),
            (0..6_u8).prop_map(Action::Ended),
            any::<bool>().prop_map(Action::Sick),
            any::<bool>().prop_map(Action::Well),
        ]
    }

    fn name_of(second: bool) -> &'static str {
        if second { "g1" } else { "g0" }
    }

    fn apply(ledger: &mut Ledger, action: Action) {
        let named = |name: u8| GrantId(format!("grant{name}"));
        match action {
            Action::Grant { name, units } => {
                let unit = |(second, index)| Unit { device: name_of(second).into(), index };
                ledger.grant(named(name), units.into_iter().map(unit).collect());
            }
            Action::Release(name) => ledger.release(&named(name)),
            Action::Start(name) => drop(ledger.start_engine(&named(name))),
            Action::Ended(name) => ledger.engine_ended(&named(name)),
            Action::Sick(second) => {
                let lost = Health::Unhealthy { reason: "lost".into() };
                ledger.follow(|device| (device == name_of(second)).then(|| lost.clone()));
            }
            Action::Well(second) => {
                ledger.follow(|device| (device == name_of(second)).then_some(Health::Healthy));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn memory_is_never_granted_or_used_twice(actions in prop::collection::vec(action(), 0..60)) {
            let mut ledger = Ledger::new(vec![device("g0", 8), device("g1", 8)]);
            for action in actions {
                apply(&mut ledger, action);
                let mut seen = BTreeSet::new();
                for unit in ledger.grants.values().flatten() {
                    prop_assert!(seen.insert(unit.clone()), "{unit} is granted twice");
                }
                for usage in ledger.usage() {
                    prop_assert!(usage.used_gib <= usage.capacity_gib, "{usage:?}");
                    prop_assert!(usage.granted_gib <= usage.capacity_gib, "{usage:?}");
                }
            }
        }

        #[test]
        fn everything_ended_is_everything_free(actions in prop::collection::vec(action(), 0..60)) {
            let mut ledger = Ledger::new(vec![device("g0", 8), device("g1", 8)]);
            for action in actions {
                apply(&mut ledger, action);
            }
            for name in 0..6 {
                apply(&mut ledger, Action::Release(name));
                apply(&mut ledger, Action::Ended(name));
            }
            for usage in ledger.usage() {
                prop_assert_eq!(usage.free_gib, usage.capacity_gib);
            }
        }

        #[test]
        fn preferred_units_are_available_and_hold_what_must_be_there(
            available in prop::collection::btree_set((any::<bool>(), 0..8_u32), 1..16),
            n_must in 0..4_usize,
            size in 1..16_usize,
        ) {
            let ledger = Ledger::new(vec![device("g0", 8), device("g1", 8)]);
            let available: BTreeSet<Unit> = available
                .into_iter()
                .map(|(second, index)| Unit { device: name_of(second).into(), index })
                .collect();
            let must: BTreeSet<Unit> = available.iter().take(n_must.min(size)).cloned().collect();
            let chosen = ledger.preferred(&available, &must, size);
            let set: BTreeSet<Unit> = chosen.iter().cloned().collect();
            prop_assert_eq!(set.len(), chosen.len(), "a unit was chosen twice");
            prop_assert!(set.is_subset(&available) && must.is_subset(&set));
            prop_assert_eq!(set.len(), size.min(available.len()));
            let alone = |name: &str| available.iter().filter(|unit| unit.device == name).count() >= size;
            let n_devices = set.iter().map(|unit| &unit.device).collect::<BTreeSet<_>>().len();
            if must.is_empty() && (alone("g0") || alone("g1")) {
                prop_assert_eq!(n_devices, 1, "one device was large enough");
            }
        }
    }
}
