//! The schemas of the chart's custom resource definitions say the same as the types that read the
//! objects: the same fields, the same values of enumerations. The fields of a type are found out by
//! reading it with a deserializer that notes what it is asked for.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::de::value::{Error, StringDeserializer};
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer,
    MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde_json::Value;
use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, PeerAuthenticationSpec, TelemetrySpec, TrafficPolicySpec,
};

/// What is at each path; `[]` stands for the items of a list, `*` for the values of a map.
type Shape = BTreeMap<String, String>;

#[test]
fn schemas_are_those_of_the_types() {
    compare::<TrafficPolicySpec>("trafficpolicies", "TrafficPolicy");
    compare::<PeerAuthenticationSpec>("peerauthentications", "PeerAuthentication");
    compare::<TelemetrySpec>("telemetries", "Telemetry");
    compare::<EgressPolicySpec>("egresspolicies", "EgressPolicy");
    compare::<ExternalServiceSpec>("externalservices", "ExternalService");
}

fn compare<T: for<'de> Deserialize<'de>>(file: &str, kind: &str) {
    let crd = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/weft/files/crds")
        .join(format!("{file}.yaml"));
    let crd: Value = serde_saphyr::from_str(&std::fs::read_to_string(crd).unwrap()).unwrap();
    assert_eq!(crd["metadata"]["name"], format!("{file}.policy.weft.dev"));
    assert_eq!(crd["spec"]["names"]["kind"], kind);
    let version = &crd["spec"]["versions"][0];
    assert_eq!(
        format!("policy.weft.dev/{}", version["name"].as_str().unwrap()),
        weft_api::policy::API_VERSION
    );
    assert!(version["subresources"]["status"].is_object());
    let columns = version["additionalPrinterColumns"].as_array().unwrap();
    let accepted = columns.iter().find(|column| column["name"] == "Accepted");
    let path = accepted.unwrap()["jsonPath"].as_str().unwrap();
    // Where the control plane writes it.
    let (list, _) = path
        .strip_prefix(".status.")
        .and_then(|path| path.split_once('['))
        .unwrap();
    let status = &version["schema"]["openAPIV3Schema"]["properties"]["status"];
    let list = list.trim_end_matches("[*]");
    assert_eq!(
        status["properties"][list]["type"], "array",
        "{kind}: {path}"
    );
    assert!(path.ends_with("conditions[?(@.type==\"Accepted\")].status"));
    let spec = &version["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut schema = Shape::new();
    walk(spec, "", &mut schema);
    let types = trace::<T>();
    assert!(types.len() > 1, "{types:?}");
    for (path, what) in &types {
        assert_eq!(schema.get(path), Some(what), "{kind}: {path} in the schema");
    }
    for path in schema.keys() {
        assert!(
            types.contains_key(path),
            "{kind}: {path} is in the schema only"
        );
    }
}

/// What a schema says is at each path.
fn walk(schema: &Value, path: &str, shape: &mut Shape) {
    let kind = schema["type"].as_str().unwrap();
    let mut what = kind.to_owned();
    if let (Some(values), "string") = (schema["enum"].as_array(), kind) {
        let values: BTreeSet<&str> = values.iter().filter_map(Value::as_str).collect();
        // An empty string is how the core group is written, not a name of a value.
        if !values.contains("") {
            what = format!("{values:?}");
        }
    }
    shape.insert(path.to_owned(), what);
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        walk(schema, &format!("{path}.{name}"), shape);
    }
    if kind == "array" {
        walk(&schema["items"], &format!("{path}[]"), shape);
    }
    if schema["additionalProperties"].is_object() {
        walk(&schema["additionalProperties"], &format!("{path}.*"), shape);
    }
}

/// Reads a type until every variant of its enumerations that hold something has been seen.
fn trace<T: for<'de> Deserialize<'de>>() -> Shape {
    let notes = Notes::default();
    for _ in 0..20 {
        let before = notes.shape.borrow().len() + notes.variants.borrow().len();
        T::deserialize(Tracer {
            path: String::new(),
            notes: &notes,
        })
        .unwrap();
        if notes.shape.borrow().len() + notes.variants.borrow().len() == before {
            break;
        }
    }
    notes.shape.into_inner()
}

#[derive(Default)]
struct Notes {
    shape: RefCell<Shape>,
    /// Variants that were taken, by path.
    variants: RefCell<BTreeSet<String>>,
}

#[derive(Clone)]
struct Tracer<'a> {
    path: String,
    notes: &'a Notes,
}

impl<'a> Tracer<'a> {
    fn note(&self, what: &str) {
        self.notes
            .shape
            .borrow_mut()
            .insert(self.path.clone(), what.to_owned());
    }

    fn at(&self, step: &str) -> Self {
        Tracer {
            path: format!("{}{step}", self.path),
            notes: self.notes,
        }
    }
}

macro_rules! integers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.note("integer");
            visitor.visit_u8(1)
        }
    )*};
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Error;

    integers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom(format!("{}: of any type", self.path)))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("boolean");
        visitor.visit_bool(true)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("number");
        visitor.visit_f64(1.0)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("string");
        // A duration, and as good a string as any other.
        visitor.visit_string("1s".to_owned())
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("array");
        visitor.visit_seq(One(Some(self.at("[]"))))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("object");
        visitor.visit_map(Fields {
            names: ["1"].iter(),
            path: Some(self.at(".*")),
            tracer: self,
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note("object");
        visitor.visit_map(Fields {
            names: fields.iter(),
            path: None,
            tracer: self,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let known: BTreeSet<&str> = variants.iter().copied().collect();
        // Until a variant turns out to hold something.
        if !self.notes.shape.borrow().contains_key(&self.path) {
            self.note(&format!("{known:?}"));
        }
        let mut taken = self.notes.variants.borrow_mut();
        let next = variants
            .iter()
            .find(|name| taken.insert(format!("{}={name}", self.path)))
            .unwrap_or(&variants[0]);
        drop(taken);
        visitor.visit_enum(Variant {
            name: next,
            tracer: self,
        })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        f32 char bytes byte_buf unit unit_struct tuple tuple_struct
    }
}

/// A list of one.
struct One<'a>(Option<Tracer<'a>>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0
            .take()
            .map(|tracer| seed.deserialize(tracer))
            .transpose()
    }
}

/// All fields of a struct, or one entry of a map.
struct Fields<'a> {
    names: std::slice::Iter<'a, &'static str>,
    /// Of the next value.
    path: Option<Tracer<'a>>,
    tracer: Tracer<'a>,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(name) = self.names.next() else {
            return Ok(None);
        };
        if !self
            .path
            .as_ref()
            .is_some_and(|path| path.path.ends_with(".*"))
        {
            self.path = Some(self.tracer.at(&format!(".{name}")));
        }
        // A key that is a number is read from its text, as serde_json does.
        let key: StringDeserializer<Error> = (*name).to_owned().into_deserializer();
        seed.deserialize(Key(key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let tracer = self.path.clone().ok_or_else(|| Error::custom("no key"))?;
        seed.deserialize(tracer)
    }
}

struct Key(StringDeserializer<Error>);

impl<'de> Deserializer<'de> for Key {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.0.deserialize_any(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u16(1)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// One variant of an enumeration.
struct Variant<'a> {
    name: &'static str,
    tracer: Tracer<'a>,
}

impl<'a, 'de> EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Tracer<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Self::Variant), Error> {
        let name: StringDeserializer<Error> = self.name.to_owned().into_deserializer();
        // Where it is when it holds something: a field of that name.
        let inside = self.tracer.at(&format!(".{}", self.name));
        Ok((seed.deserialize(name)?, inside))
    }
}

impl<'de> VariantAccess<'de> for Tracer<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        let (outside, _) = self.path.rsplit_once('.').unwrap_or_default();
        self.at("")
            .notes
            .shape
            .borrow_mut()
            .insert(outside.to_owned(), "object".to_owned());
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("a tuple"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        Err(Error::custom("a struct"))
    }
}
